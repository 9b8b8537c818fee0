"""The chart of reported AP against measured time, with invented figures."""

import json
import time

import detectors
import pytest
import table_rows
import turns

from lite_detr.errors import LiteDetrError

LITE = "dino/lite_dino_r50_h3l1_2p1x3_36ep.py"
SPARSE = "baselines/sparse_detr_r50_rho03_50ep.py"


def write(path, *subjects):
    times = {"median": 3000.0, "p10": 2900.0, "p90": 3100.0}
    records = [
        {
            "case": {"subject": subject, "size": [800, 1066]},
            "milliseconds": {
                "latency": times,
                "backbone": {"median": 2000.0},
                "encoder": {"median": 500.0},
            },
            "memory_bytes": memory,
        }
        for subject, memory in zip(subjects, (None, {"peak": 2**29, "encoder": 2**28}, None))
    ]
    path.write_text(json.dumps({"records": records}))
    return str(path)


def test_a_table_and_a_chart_are_made_in_the_order_of_ap(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(detectors, "multiply_adds", lambda *case: 1.5e11)
    file = write(tmp_path / "rows.json", LITE, SPARSE, "own.py")
    table_rows.main([file, "--chart", str(tmp_path / "rows.png")])
    *_, first, second = capsys.readouterr().out.splitlines()
    figures = "46.0 | 150.0 | 3000 | 2900 | 3100 | 2000 | 500 | 512 | 256"
    assert first == f"| Sparse DETR rho-0.3 | {figures} |"
    assert second.startswith("| Lite-DINO H3L1-(2+1)x3 | 50.4 |") and second.endswith("| – | – |")
    assert (tmp_path / "rows.png").stat().st_size > 1000


def test_every_reported_row_has_a_config(capsys):
    table_rows.main(["--list"])
    names = capsys.readouterr().out.split()
    assert len(names) == 23 and {LITE, SPARSE} <= set(names)


@pytest.mark.parametrize("subjects", [("own.py",), (LITE, LITE)])
def test_a_file_of_other_figures_is_refused(subjects, tmp_path, capsys):
    with pytest.raises((LiteDetrError, SystemExit)):
        table_rows.main([write(tmp_path / "rows.json", *subjects)])
    assert "one record of each config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "series", "label"),
    [
        ("Lite-H-DETR H3L1-(2+1)x3", "H-DETR", "H3L1-(2+1)x3"),
        ("DINO-3scale", "DINO", "3scale"),
        ("Lite-Deformable DETR H2L2-(2+1)x3", "Deformable DETR", "H2L2-(2+1)x3"),
        ("DN-DETR-DC5", table_rows.OTHERS, "DN-DETR-DC5"),
    ],
)
def test_a_label_is_what_its_series_does_not_say(model, series, label):
    row = table_rows.Row(model, 50.0, 150.0, (1.0, 1.0, 1.0), 1.0, 1.0, None)
    assert (row.series, row.label) == (series, label)


def test_the_clock_of_the_process_stands_still_while_others_run():
    stopwatch = turns.Stopwatch("cpu", "process")
    stopwatch.start()
    with stopwatch.part("data"):
        time.sleep(0.2)  # As a process does that waits for the CPU.
    assert stopwatch.stop()["data"] < 0.1
