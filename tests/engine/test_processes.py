"""Two processes train, fail and evaluate as one does."""

import resource

import pytest
import torch
import training_runs
from programs import TRAIN_NET, data_options, run_python
from small_detectors import assert_same_gradients, gradients, small_detector, small_inputs
from training_runs import CONFIG

from lite_detr.data.digits import write_digits_dataset
from lite_detr.engine.trainer import Trainer
from lite_detr.optimizer import ClippedAdamW

# The objects of all images, of which the first half goes to the first process, and the batches
# that each process makes of its half.
CASES = {
    f"{name} {case}": (name, objects, accumulation)
    for name in ("deformable_detr", "dino", "h_detr")
    for case, objects, accumulation in (
        ("with objects in one process", (0, 2), 1),
        ("with one object in all", (0, 0, 0, 1), 1),
        ("with two batches in each", (2, 0, 1, 3), 2),
    )
}

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch is built without gloo",
)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return training_runs.run_in_processes(
        training_runs.learn, tmp_path_factory.mktemp("learn"), CASES
    )


@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_half_the_batch_have_the_gradients_of_one(case, learned):
    name, objects, _ = CASES[case]
    model = small_detector(name)
    trainer = Trainer(model, [], ClippedAdamW(model.parameters(), lr=1e-4))
    losses = trainer.accumulate([small_inputs(*objects)])
    for process in learned:
        assert_same_gradients(process[case]["gradients"], gradients(model), tolerance=1e-6)
        # In the records they are of float32.
        found = {name: loss.item() for name, loss in process[case]["losses"].items()}
        assert found == pytest.approx({n: loss.item() for n, loss in losses.items()}, rel=1e-5)


def test_objects_are_counted_in_all_processes(tmp_path):
    assert training_runs.run_in_processes(training_runs.count, tmp_path) == [9.0, 9.0]


def test_a_loss_that_is_not_finite_in_one_process_stops_both(tmp_path):
    first, second = training_runs.run_in_processes(training_runs.diverge, tmp_path, 0)
    assert first == second
    assert "iteration 1" in first and "loss_a nan" in first
    assert "images: bad.jpg\n" in first


def test_both_processes_skip_what_is_bad_in_one(tmp_path):
    first, second = training_runs.run_in_processes(training_runs.diverge, tmp_path, 1)
    assert first == second
    assert first.startswith("1 bad, [0.8")


def test_every_image_is_evaluated_once(tmp_path):
    """Of five images, which two processes cannot share evenly."""
    write_digits_dataset(tmp_path, num_train=1, num_val=5)
    options = [
        *data_options(tmp_path, "val"),
        f"dataloader.evaluator.output_dir={tmp_path}",
    ]
    arguments = (training_runs.evaluate, tmp_path, str(CONFIG), options)
    alone = training_runs.run_in_processes(*arguments, world_size=1)[0]
    (tmp_path / "meeting").unlink(missing_ok=True)
    together = training_runs.run_in_processes(*arguments)[0]
    assert len(alone) == 5
    assert together == alone


gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch is built without gloo",
)


@gloo
def test_what_happens_to_the_first_process_happens_to_all(tmp_path):
    said = training_runs.run_in_processes(training_runs.fail_in_the_first, tmp_path)
    assert said == ["the disk is full"] * 2


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digits_dataset(root, num_train=5, num_val=2)
    return data_options(root)


def check_line(line, folder):
    start = f"error: {folder}/model_0000001.pth cannot be written: "
    assert line.startswith(start) and "File too large. The files in" in line


@gloo
def test_a_full_disk_ends_all_processes_alike(digits, tmp_path):
    options = [*digits, f"train.output_dir={tmp_path}/output"]
    ends = training_runs.run_in_processes(training_runs.train_on_a_full_disk, tmp_path, options)
    for code, said in ends:
        assert code == 1
        [line] = [line for line in said.splitlines() if "error" in line]
        check_line(line, tmp_path / "output")
    for log in ("log.txt", "log.txt.rank1"):
        text = (tmp_path / "output" / log).read_text()
        assert "cannot be written" in text and "Traceback" not in text


@pytest.fixture
def small_disk():
    """Programs that are started can write files of a megabyte at most."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@gloo
@pytest.mark.slow
def test_a_full_disk_ends_a_job_with_one_line(digits, tmp_path, small_disk):
    run = run_python(
        *(TRAIN_NET, "--config-file", CONFIG, "--num-gpus", "2", "--dist-url", "auto"),
        *digits,
        f"train.output_dir={tmp_path}",
    )
    assert run.returncode == 1, run.stderr[-3000:]
    assert "Traceback" not in run.stdout + run.stderr
    [line] = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    check_line(line, tmp_path)
