"""A process of a job is killed or interrupted: the job ends, or torchrun starts it once more."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from programs import ONE_PROCESS, TRAIN_NET, data_options, environment
from soak import differences
from training_runs import CONFIG

from lite_detr.data.digits import write_digits_dataset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="torch is built without gloo",
    ),
]

MINUTE = 60
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digits_dataset(root, num_train=5, num_val=2)
    return data_options(root)


@pytest.fixture
def start():
    """Starts a job, whose last process is killed when the test is over."""
    jobs = []

    def start_job(*arguments):
        job = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        jobs.append(job)
        return job

    yield start_job
    for job in jobs:
        for pid in processes(job):
            os.kill(pid, signal.SIGKILL)
        job.wait()
        job.stderr.close()


def processes(job):
    """The processes of a job that are alive, and their parents.

    Those that torchrun starts have sessions of their own.
    """
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent, _, session, *_ = fields
        if job.pid in (int(parent), int(session)) and state != "Z":
            found[int(stat.parent.name)] = int(parent)
    return found


def training_processes(job):
    """The children of the process that started the job, but for one that multiprocessing has."""
    children = [pid for pid, parent in processes(job).items() if parent == job.pid]
    return [
        pid
        for pid in children
        if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill_one(job, output):
    """In the middle of the training, when it has saved a checkpoint."""
    wait_for(lambda: (output / "model_0000001.pth").exists() or job.poll() is not None, 200)
    first, second = sorted(training_processes(job))
    os.kill(second, signal.SIGKILL)


def test_one_that_is_killed_takes_the_job_down_within_a_minute(digits, tmp_path, start):
    """With the processes that read its data."""
    job = start(
        *(TRAIN_NET, "--config-file", CONFIG, "--num-gpus", "2", "--dist-url", "auto", *digits),
        f"train.output_dir={tmp_path}",
        *("train.max_iter=10000", "train.eval_period=0", "dataloader.train.num_workers=1"),
    )
    kill_one(job, tmp_path)
    _, said = job.communicate(timeout=MINUTE)
    wait_for(lambda: not processes(job), 30)
    assert job.returncode == 128 + signal.SIGKILL
    assert "error: process 1 terminated with signal SIGKILL" in said


@pytest.mark.parametrize("options", [ONE_PROCESS, ["--num-gpus", "2", "--dist-url", "auto"]])
def test_an_interrupt_from_the_keyboard_is_one_line(options, digits, tmp_path, start):
    """All processes of a terminal's job get it."""
    job = start(
        *(TRAIN_NET, "--config-file", CONFIG, *options, *digits),
        f"train.output_dir={tmp_path}",
        *("train.max_iter=10000", "train.eval_period=0", "dataloader.train.num_workers=1"),
    )
    wait_for(lambda: (tmp_path / "model_0000001.pth").exists() or job.poll() is not None, 200)
    os.killpg(job.pid, signal.SIGINT)
    _, said = job.communicate(timeout=MINUTE)
    assert job.returncode == 128 + signal.SIGINT
    assert "Traceback" not in said and said.count("error:") == 1
    assert said.strip().endswith("error: interrupted")


def test_a_data_worker_that_is_killed_is_one_line(digits, tmp_path, start):
    job = start(
        *(TRAIN_NET, *ONE_PROCESS, "--config-file", CONFIG, *digits),
        f"train.output_dir={tmp_path}",
        *("train.max_iter=10000", "train.eval_period=0", "dataloader.train.num_workers=1"),
    )
    wait_for(lambda: (tmp_path / "model_0000001.pth").exists() or job.poll() is not None, 200)
    os.kill(max(training_processes(job)), signal.SIGKILL)
    _, said = job.communicate(timeout=MINUTE)
    assert job.returncode == 1 and "Traceback" not in said
    assert "error: a process that reads data has died" in said


def test_torchrun_starts_the_job_again_which_ends_as_if_nothing_had_happened(
    digits, tmp_path, start
):
    def arguments(output):
        options = [
            *digits,
            f"train.output_dir={output}",
            "train.max_iter=20",
            "train.eval_period=0",
        ]
        return (TRAIN_NET, "--config-file", CONFIG, "--resume", *options)

    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    job = start(*TORCHRUN, *arguments(undisturbed))
    _, said = job.communicate(timeout=600)
    assert job.returncode == 0, said[-3000:]

    job = start(*TORCHRUN, "--max-restarts", "1", *arguments(disturbed))
    kill_one(job, disturbed)
    _, said = job.communicate(timeout=600)
    assert job.returncode == 0, said[-3000:]
    assert (disturbed / "log.txt").read_text().count("Starting training from iteration") == 2
    assert differences(undisturbed, disturbed) == []
