"""The study of several detectors, from records of runs that are complete or not."""

import json
import subprocess
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


def write_run(folder, seconds, precisions, last=40):
    """Records as training writes them: every 10 iterations, and evaluated at 20 and at the end."""
    folder.mkdir(parents=True)
    times = [{"iteration": i, "time": seconds} for i in (9, 19, 29, 39)]
    evaluations = [
        {"iteration": i, "bbox/AP": ap, "bbox/AP-cat": 1.0} for i, ap in zip((19, last), precisions)
    ]
    lines = [json.dumps(record) + "\n" for record in times + evaluations]
    (folder / "metrics.json").write_text("".join(lines))


def test_complete_runs_are_compared_and_not_repeated(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it trains again"))
    out = tmp_path / "out"
    for seed, (lite, full) in enumerate([((20, 40), (18, 50)), ((22, 44), (18, 52))]):
        write_run(out / "Lite-DINO" / f"seed_{seed}", 1.5, lite)
        write_run(out / "full_DINO" / f"seed_{seed}", 3.0, full)
    run(write())
    results = json.loads((out / "results.json").read_text())
    assert results["seconds"] == 60 and results["iterations"] == 40
    assert results["variants"]["Lite-DINO"]["AP"] == [40, 44]
    # After a minute the full one has done half of its iterations.
    assert results["variants"]["full DINO"]["AP_at_equal_time"] == [18, 18]
    assert results["runs"][0]["curve"] == [[20, 30.0, 20], [40, 60.0, 40]]
    assert (out / "curves.png").stat().st_size > 10000
    assert "| full DINO | 2 | 51.00 ± 1.41 | 50.00, 52.00 | 2.0 | 18.00 ± 0.00 |" in (
        capsys.readouterr().out
    )


def test_incomplete_runs_go_on_and_a_failed_one_is_named(write, tmp_path, capsys, monkeypatch):
    commands = []

    def fail(command, **options):
        commands.append(command)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(subprocess, "run", fail)
    folder = tmp_path / "out" / "Lite-DINO" / "seed_0"
    # Its last evaluation is of iteration 30 of 40.
    write_run(folder, 1.0, (20, 30), last=29)
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


def test_variants_of_different_lengths_are_refused(write, capsys):
    longer = [
        {"name": name, "config": config, "overrides": [f"train.max_iter={len(name)}"]}
        for name, config in {**CONFIGS, "b": CONFIGS["full DINO"]}.items()
    ]
    with pytest.raises(SystemExit):
        study.main([str(a) for a in write(variants=longer)])
    assert "'Lite-DINO': 9, 'full DINO': 9, 'b': 1} iterations: give train.max_iter=N" in (
        capsys.readouterr().err
    )
