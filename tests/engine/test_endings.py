"""How trainings end for what their users can mend."""

import resource

import pytest
import torch
import training_runs
from programs import TRAIN_NET, data_options, run_python
from training_runs import CONFIG

from lite_detr.data.digits import write_digits_dataset

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
