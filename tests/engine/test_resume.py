"""Killed and resumed training runs, compared bit by bit with one that was not killed."""

import functools
import shutil
import signal

import pytest
import soak
import torch
from programs import data_options
from soak import differences, records
from training_runs import CONFIG, signal_at, train

from lite_detr.data.digits import write_digits_dataset
from lite_detr.engine.preemption import EXIT_CODE

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The options of a training on them."""
    root = tmp_path_factory.mktemp("digits")
    write_digits_dataset(root, num_train=5, num_val=2)
    return data_options(root)


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """The output folder of a training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(*digits, f"train.output_dir={folder}") == 0
    return folder


def test_convolutions_are_trained_with_channels_last(whole):
    weights = torch.load(whole / "model_final.pth", weights_only=True)["model"]
    kernels = [w for w in weights.values() if w.dim() == 4 and min(w.shape[1:]) > 1]
    assert kernels
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)


# Where a process of the training gets a signal, and how it ends.
POINTS = {
    "before the first checkpoint": ("lite_detr.engine.training:ResumePoint", "after_step", 2),
    "in the first save": ("os", "replace", 1),
    "between a checkpoint and its tag": ("os", "replace", 2),
    "in an evaluation": ("lite_detr.engine.training", "evaluate", 1),
    "in an iteration": ("lite_detr.engine.training:ResumePoint", "after_step", 2),
    "between an iteration's checkpoint and its record": (
        "detectron2.utils.events:JSONWriter",
        "write",
        2,
    ),
    "in the last save": ("os", "replace", 3),
    "in the last evaluation": ("lite_detr.engine.training", "evaluate", 1),
}


def test_a_training_that_is_killed_at_every_kind_of_point_ends_as_one_that_is_not(
    whole, digits, tmp_path
):
    """One after the other: each start gets further than the one before."""
    options = [*digits, f"train.output_dir={tmp_path}"]
    for point, where in POINTS.items():
        end = train(*options, resume=True, prepare=functools.partial(signal_at, *where))
        assert end == KILLED, point
    assert train(*options, resume=True) == 0
    assert differences(whole, tmp_path) == []
    assert len(records(whole)) == 6
    assert list(tmp_path.glob("*.unfinished")) == []


@pytest.mark.parametrize(
    "number, num_workers",
    [(signal.SIGTERM, 2), pytest.param(signal.SIGUSR1, 0, marks=pytest.mark.slow)],
)
def test_a_scheduler_gets_a_checkpoint_within_an_iteration(
    number, num_workers, whole, digits, tmp_path
):
    """With workers, which get the signal, too, and decode ahead, the training is the same."""
    options = [
        *digits,
        f"train.output_dir={tmp_path}",
        f"dataloader.train.num_workers={num_workers}",
    ]
    # Behind iteration 2, evaluation and a picture take three calls: the eighth is iteration 4.
    where = ("lite_detr.modeling.detector:Detector", "encode", 8, number)
    assert train(*options, prepare=functools.partial(signal_at, *where)) == EXIT_CODE
    saved = torch.load(tmp_path / "model_last.pth", weights_only=True)
    assert saved["iteration"] == 4
    assert train(*options, resume=True) == 0
    assert differences(whole, tmp_path) == []


def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(digits, tmp_path):
    options = [*digits, f"train.output_dir={tmp_path}"]
    where = ("lite_detr.modeling.detector:Detector", "predict", 1, signal.SIGTERM)
    assert train(*options, prepare=functools.partial(signal_at, *where)) == EXIT_CODE
    # Of the iteration that was to be evaluated.
    saved = torch.load(tmp_path / "model_last.pth", weights_only=True)
    assert saved["iteration"] == 2


@pytest.fixture
def copy_of_whole(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def test_a_finished_training_that_is_resumed_stays_as_it_was(whole, digits, copy_of_whole):
    assert train(*digits, f"train.output_dir={copy_of_whole}", resume=True) == 0
    assert differences(whole, copy_of_whole) == []


@pytest.mark.parametrize("name", ["metrics.json", "model_final.pth", "model_0000003.pth"])
def test_the_comparison_sees_what_is_missing_or_other(name, whole, copy_of_whole):
    path = copy_of_whole / name
    if name == "metrics.json":
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    elif name == "model_final.pth":
        path.unlink()
    else:
        content = torch.load(path, weights_only=True)
        content["trainer"]["optimizer"]["state"][0]["exp_avg"] *= 1 + 1e-6
        torch.save(content, path)
    [difference] = differences(whole, copy_of_whole)
    assert difference.startswith(name)


@pytest.mark.slow
def test_two_processes_with_kills_at_random_moments_end_as_if_there_were_none(
    digits, tmp_path, capsys
):
    arguments = ["--config-file", CONFIG, "--num-gpus", "2", "--kill-every", "30"]
    options = [*digits, "train.max_iter=60"]
    with pytest.raises(SystemExit) as end:
        soak.main([*map(str, arguments), "--output", str(tmp_path / "soak"), *options])
    assert not end.value.code, capsys.readouterr().out
