"""The best weights, and the end of a run that gets no better, across restarts and processes."""

import math

import pytest
import torch
from soak import differences
from training_runs import evaluate_together, evaluated_run, run_in_processes

from lite_detr.errors import ConfigError

# Iteration 1 is the best; the two evaluations after it are not better, and the rest is not reached.
VALUES = [10.0, 20.0, math.nan, 20.0, 25.0, 99.0]


def weights(path):
    return torch.load(path, weights_only=True)["model"]["weight"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("stopped")
    trainer = evaluated_run(folder, VALUES)
    assert trainer.stopped and trainer.iter == 3
    return folder


def test_a_run_that_gets_no_better_keeps_the_best_and_the_last_weights(stopped):
    saved = torch.load(stopped / "model_final.pth", weights_only=True)
    assert saved["iteration"] == 3
    assert (stopped / "last_checkpoint").read_text() == "model_final.pth"
    # A step takes 0.1 off the weights: those after two steps, and after four.
    assert weights(stopped / "model_best.pth").mean() == pytest.approx(0.8, abs=0.01)
    assert weights(stopped / "model_final.pth").mean() == pytest.approx(0.6, abs=0.01)
    assert (stopped / "model_final_ema.pth").is_file()


def test_a_run_that_is_killed_anywhere_ends_as_one_that_is_not(stopped, tmp_path):
    """Files take their names, evaluations and records come: at each of these moments once."""
    for kill_at in range(1, 100):
        folder = tmp_path / str(kill_at)
        if not evaluated_run(folder, VALUES, kill_at).killed:
            break
        trainer = evaluated_run(folder, VALUES)
        assert trainer.stopped and trainer.iter == 3, kill_at
        assert differences(stopped, folder) == [], kill_at
    assert kill_at > 25


def test_a_stopped_run_that_is_resumed_stops_again_or_goes_on_if_it_may(stopped, tmp_path):
    evaluated_run(tmp_path, VALUES)
    trainer = evaluated_run(tmp_path, VALUES)
    assert trainer.stopped and trainer.iter == 3
    assert differences(stopped, tmp_path) == []

    trainer = evaluated_run(tmp_path, VALUES, patience=3)
    assert not trainer.stopped and trainer.iter == len(VALUES)
    evaluated_run(tmp_path / "at once", VALUES, patience=3)
    assert differences(tmp_path / "at once", tmp_path) == []


def test_without_patience_a_run_goes_to_its_end(tmp_path):
    trainer = evaluated_run(tmp_path, [3.0, 2.0, 1.0, 0.0], patience=0)
    assert not trainer.stopped and trainer.iter == 4
    assert weights(tmp_path / "model_best.pth").mean() == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("nothing", [math.nan, None])
def test_evaluations_that_find_nothing_are_no_better_ones(nothing, tmp_path):
    trainer = evaluated_run(tmp_path, [nothing] * 5)
    assert trainer.stopped and trainer.iter == 1
    assert not (tmp_path / "model_best.pth").exists()
    trainer = evaluated_run(tmp_path / "2", [1.0, nothing, 2.0, nothing, nothing, 9.0])
    assert trainer.stopped and trainer.iter == 4


def test_a_metric_of_the_average_keeps_the_average(tmp_path):
    evaluated_run(tmp_path / "weights", VALUES)
    evaluated_run(tmp_path / "average", VALUES, metric="bbox_ema/AP")
    plain, average = (
        weights(tmp_path / name / "model_best.pth") for name in ("weights", "average")
    )
    assert (average > plain).all()


def test_weights_that_were_best_are_no_checkpoint_to_resume_from(stopped, tmp_path):
    """Without all others, there is none."""
    (tmp_path / "model_best.pth").write_bytes((stopped / "model_best.pth").read_bytes())
    assert evaluated_run(tmp_path, VALUES).start_iter == 0


def test_a_metric_that_is_not_measured_is_named_with_those_that_are(tmp_path):
    with pytest.raises(ConfigError, match=r"bbox/AP5: .* but bbox/AP, bbox_ema/AP\. Give one"):
        evaluated_run(tmp_path, VALUES, metric="bbox/AP5")


def test_two_processes_stop_together_also_after_kills(tmp_path):
    runs = {"whole": [0, 0], "killed": [6, 3, 0]}
    ends = run_in_processes(evaluate_together, tmp_path, VALUES, runs)
    assert ends == [dict.fromkeys(runs, (3, True, 20.0, 1))] * 2
    assert differences(tmp_path / "whole", tmp_path / "killed") == []
