"""How train_net.py's processes come together: torchrun, Slurm, and what does not fit."""

import argparse
import json
import socket
import subprocess
import sys

import pytest
import torch
from programs import TINY, TRAIN_NET, data_options, environment, run_python

from lite_detr.data.digits import write_digits_dataset
from lite_detr.engine.launch import (
    SLURM_PORTS,
    LaunchError,
    find_place,
    join,
    launch,
)

# What Python runs as torchrun.
TORCHRUN_PROGRAM = ("-m", "torch.distributed.run", "--standalone")
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "11",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "8",
}
SLURM = {
    "SLURM_JOB_ID": "120007",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04,09]",
}


def options(num_gpus=1, num_machines=1):
    return argparse.Namespace(num_gpus=num_gpus, num_machines=num_machines)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digits_dataset(root, num_train=4, num_val=2)
    return root


def train_net(digits, output):
    """The arguments of Python for a training of one iteration and its evaluation."""
    return [
        *(str(TRAIN_NET), "--config-file", str(TINY)),
        *data_options(digits),
        f"train.output_dir={output}",
        "train.max_iter=1",
    ]


def check_trained_by_two(output):
    records = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert any("total_loss" in record for record in records)
    assert any("bbox/AP50" in record for record in records)
    # Detectron2 gives each process but the first a log of its own.
    assert "World size: 2" in (output / "log.txt.rank1").read_text()


@pytest.mark.slow
def test_torchrun_trains_and_evaluates_in_two_processes(digits, tmp_path):
    run = run_python(*TORCHRUN_PROGRAM, "--nproc-per-node", "2", *train_net(digits, tmp_path))
    assert run.returncode == 0, run.stderr[-3000:]
    check_trained_by_two(tmp_path)


@pytest.mark.slow
def test_two_tasks_of_slurm_train_and_evaluate(digits, tmp_path):
    job = next(job for job in range(len(SLURM_PORTS)) if is_free(SLURM_PORTS[job]))
    slurm = SLURM | {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }
    tasks = [
        start(train_net(digits, tmp_path), slurm | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank})
        for rank in ("0", "1")
    ]
    check_ends(tasks)
    check_trained_by_two(tmp_path)


@pytest.mark.slow
def test_two_machines_train_and_evaluate(digits, tmp_path):
    """Each of which starts its own process."""
    port = next(port for port in SLURM_PORTS if is_free(port))
    program, *arguments = train_net(digits, tmp_path)
    place = ("--num-machines", "2", "--dist-url", f"tcp://localhost:{port}")
    machines = [
        start([program, *place, "--machine-rank", rank, *arguments], {}) for rank in ("0", "1")
    ]
    check_ends(machines)
    check_trained_by_two(tmp_path)


def start(arguments, variables):
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def check_ends(processes):
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    ends = [process.returncode for process in processes]
    assert ends == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]


def is_free(port):
    with socket.socket() as sock:
        return sock.connect_ex(("localhost", port)) != 0


@pytest.mark.slow
def test_an_error_in_a_process_of_torchrun_reaches_its_exit_status(tmp_path):
    arguments = train_net(tmp_path / "nowhere", tmp_path)
    run = run_python(*TORCHRUN_PROGRAM, "--nproc-per-node", "1", *arguments)
    assert run.returncode == 1
    assert "error: " in run.stderr and "nowhere/val.json" in run.stderr
    assert "Traceback" not in run.stderr.split("error: ")[0]


def test_without_a_launcher_the_job_is_to_be_started():
    assert find_place(options(num_gpus=8), {}) is None


def test_torchrun_says_the_place_of_each_process():
    assert find_place(options(), TORCHRUN) == ("torchrun", 11, 16, 3, 8, "env://")


def test_slurm_says_the_place_and_its_first_machine_is_where_all_meet():
    assert find_place(options(), SLURM) == ("Slurm", 11, 16, 3, 8, "tcp://gpu03:20007")


@pytest.mark.parametrize(
    "nodes, first", [("gpu7", "gpu7"), ("a,b[1-2]", "a"), ("r1n[007,009]-ib,x", "r1n007-ib")]
)
def test_the_first_machine_is_read_from_lists_of_all_kinds(nodes, first):
    place = find_place(options(), SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert place.init_method == f"tcp://{first}:20007"


def test_another_meeting_point_can_be_given_to_the_tasks_of_slurm():
    place = find_place(options(), SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4242"})
    assert place.init_method == "tcp://10.0.0.1:4242"


def test_a_single_task_of_slurm_and_a_batch_script_start_the_job_themselves():
    assert find_place(options(num_gpus=8), SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    # What sbatch sets where its script calls the program without srun.
    assert find_place(options(num_gpus=8), {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None


def test_a_task_on_each_machine_starts_the_processes_of_that_machine():
    tasks = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert find_place(options(num_gpus=8, num_machines=2), SLURM | tasks) is None


@pytest.mark.parametrize("launcher, variables", [("torchrun", TORCHRUN), ("Slurm", SLURM)])
def test_processes_that_would_start_more_are_refused(launcher, variables):
    with pytest.raises(LaunchError, match=f"{launcher} has started 16 processes.*--num-gpus 8"):
        find_place(options(num_gpus=8), variables)


def test_machines_with_different_numbers_of_tasks_are_refused():
    with pytest.raises(LaunchError, match="8,4 tasks.*--ntasks-per-node"):
        find_place(options(), SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8,4"})


def test_tasks_that_are_dealt_out_in_turns_are_refused():
    with pytest.raises(LaunchError, match="task 11 is number 5 .*--distribution=block"):
        find_place(options(), SLURM | {"SLURM_LOCALID": "5"})


def test_a_variable_that_is_missing_is_named():
    with pytest.raises(LaunchError, match="LOCAL_WORLD_SIZE is not set"):
        find_place(options(), {k: v for k, v in TORCHRUN.items() if k != "LOCAL_WORLD_SIZE"})


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(LaunchError, match="8 processes on this machine, where 1 GPUs are visible"):
        join(find_place(options(), TORCHRUN))


def test_more_gpus_than_there_are_cannot_be_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LaunchError, match="--num-gpus 8 asks for more GPUs than the 2"):
        launch(None, options(num_gpus=8))
