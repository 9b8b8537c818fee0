"""The study of several detectors, from records of runs that are complete or not."""

import json
import subprocess
from itertools import product
from types import SimpleNamespace

import pytest
import study

CONFIGS = {
    "Lite-DINO": "digits/lite_dino_efficientnet_lite0.py",
    "full DINO": "digits/dino_efficientnet_lite0.py",
}


@pytest.fixture
def write(tmp_path):
    def write_study(**changes):
        content = {
            "seeds": [0, 1],
            "variants": [{"name": n, "config": c} for n, c in CONFIGS.items()],
        }
        (tmp_path / "study.json").write_text(json.dumps(content | changes))
        return ["--study", tmp_path / "study.json", "--output", tmp_path / "out"]

    return write_study


def run(arguments, *overrides):
    study.main([*map(str, arguments), "train.max_iter=40", *overrides])


def write_run(folder, precisions, iterations=(19, 40)):
    """Records as training writes them, evaluated in its midst and after its end."""
    folder.mkdir(parents=True)
    records = [{"iteration": 9, "time": 1.5}] + [
        {"iteration": i, "bbox/AP": ap, "bbox/AP-cat": 1.0} for i, ap in zip(iterations, precisions)
    ]
    (folder / "metrics.json").write_text("".join(json.dumps(r) + "\n" for r in records))


def write_times(path, *configs):
    records = [
        {
            "case": {"subject": c, "task": "training"},
            "milliseconds": {"latency": {"median": 1500 * i}},
        }
        for i, c in enumerate(configs, 1)
    ]
    path.write_text(json.dumps({"records": records}))
    return ["--step-times", path]


def test_complete_runs_are_compared_and_not_repeated(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it trains again"))
    out = tmp_path / "out"
    lengths = [(name, config, 40) for name, config in CONFIGS.items()]
    lengths.append(("short", CONFIGS["full DINO"], 20))
    variants = [
        {"name": name, "config": config, "overrides": [f"train.max_iter={iterations}"]}
        for name, config, iterations in lengths
    ]
    for seed, (lite, full) in enumerate([((20, 40), (18, 50)), ((22, 44), (18, 52))]):
        write_run(out / "Lite-DINO" / f"seed_{seed}", lite)
        write_run(out / "full_DINO" / f"seed_{seed}", full)
        write_run(out / "short" / f"seed_{seed}", (30,), (20,))
    times = write_times(tmp_path / "times.json", *CONFIGS.values())
    # What the command line says comes last, and would be for all.
    study.main([*map(str, write(variants=variants)), *map(str, times)])
    results = json.loads((out / "results.json").read_text())["variants"]
    assert results["Lite-DINO"]["curves"] == {"0": [[20, 20], [40, 40]], "1": [[20, 22], [40, 44]]}
    assert results["full DINO"]["seconds_per_step"] == 3.0
    assert (out / "curves.png").stat().st_size > 10000
    printed = capsys.readouterr().out
    assert "| full DINO | 40 | 2.0 | 51.00 ± 1.41 | 50.0, 52.0 |" in printed
    assert "| short | 20 | 1.0 | 30.00 ± 0.00 | 30.0, 30.0 |" in printed


def test_without_times_there_are_no_minutes(write, tmp_path, capsys):
    for seed, name in product((0, 1), ("Lite-DINO", "full_DINO")):
        write_run(tmp_path / "out" / name / f"seed_{seed}", (20, 40))
    run(write())
    assert "| variant | iterations | AP | AP of each seed |" in capsys.readouterr().out


def test_times_of_other_configs_are_refused(write, tmp_path, capsys):
    times = write_times(tmp_path / "times.json", CONFIGS["Lite-DINO"])
    with pytest.raises(SystemExit):
        run([*write(), *times])
    assert f"has no time of {CONFIGS['full DINO']}" in capsys.readouterr().err
    (tmp_path / "times.json").write_text("{}")
    with pytest.raises(SystemExit):
        run([*write(), *times])
    assert "has no times of training steps (KeyError" in capsys.readouterr().err


def test_incomplete_runs_go_on_and_a_failed_one_is_named(write, tmp_path, capsys, monkeypatch):
    commands = []

    def fail(command, **options):
        commands.append(command)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(subprocess, "run", fail)
    folder = tmp_path / "out" / "Lite-DINO" / "seed_0"
    # Its last evaluation is of iteration 30 of 40.
    write_run(folder, (20, 30), (19, 29))
    with pytest.raises(SystemExit) as end:
        run(write(), "optimizer.lr=0.001")
    assert end.value.code == 1
    assert f"ended with status 3: see {folder / 'study.log'}" in capsys.readouterr().err
    assert {"--resume", "optimizer.lr=0.001", "train.seed=0", f"train.output_dir={folder}"} <= set(
        commands[0]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": None}, "is not a study (TypeError"),
        ({"variants": [{"name": "a"}]}, "is not a study (KeyError: 'config')"),
        ({"seeds": []}, "must hold a seed and a variant or more, each only once"),
        ({"seeds": [1, 1]}, "each only once"),
        ({"variants": [{"name": n, "config": c} for n in "a" for c in CONFIGS.values()]}, "once"),
    ],
)
def test_what_is_not_a_study_is_refused(write, changes, message, capsys):
    with pytest.raises(SystemExit):
        run(write(**changes))
    assert message in capsys.readouterr().err
