"""Start a job's processes, or join those that torchrun or Slurm has started."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from detectron2.engine import launch as spawn
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing import ProcessExitedException

from ..errors import LaunchError
from ..signals import passing_signals_on

# Below the ports that Linux assigns by itself, which begin at 32768.
SLURM_PORTS = range(20000, 30000)


class Place(NamedTuple):
    """The place of this process in a job, from the environment of a launcher.

    Attributes:
        launcher: ``torchrun`` or ``Slurm``.
        rank, world_size: the number of this process in the job, and of all its processes.
        local_rank, local_size: the same among the processes of this machine.
        init_method: where the processes meet, for ``torch.distributed``.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    init_method: str


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run ``main(args)`` in every process of a job.

    If torchrun, or Slurm with more than one task, has started this process, it joins the job's
    processes. Otherwise Detectron2 starts as many as the options say, and this process ends with
    the exit status of the first that fails; signals to it are passed on to them.

    Args:
        main: the function to run; in it, Detectron2's ``comm`` knows all processes.
        args: the options of a job, see ``lite_detr.commands.train``.

    Raises:
        LaunchError: the environment is incomplete, or the options or the GPUs do not fit.
    """
    place = find_place(args, os.environ)
    if place is not None:
        join(place)
        main(args)
        # Not after an error: the others may still wait for this process, which must end.
        distributed.destroy_process_group()
        return
    if args.num_machines > 1 and args.dist_url == "auto":
        raise LaunchError(
            f"--num-machines {args.num_machines} needs --dist-url tcp://ADDRESS:PORT, where the "
            "processes of all machines meet: the address of the first and a free port of it"
        )
    # Detectron2 would only say that an assertion failed, in each of the processes.
    if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        raise LaunchError(
            f"--num-gpus {args.num_gpus} asks for more GPUs than the {torch.cuda.device_count()} "
            "that are visible here: lower it, or see CUDA_VISIBLE_DEVICES"
        )
    try:
        with passing_signals_on():
            spawn(
                main,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
            )
    except ProcessExitedException as error:
        if error.exit_code < 0:
            # Killed: only this process can say so. The status is that of shells.
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(
            error.exit_code if error.exit_code > 0 else 128 - error.exit_code
        ) from None


def find_place(args: argparse.Namespace, environment: Mapping[str, str]) -> Place | None:
    """Return the place that the environment gives this process; None if it must start the job.

    Raises:
        LaunchError: see :func:`launch`.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        place = torchrun_place(environment)
    elif int(environment.get("SLURM_STEP_NUM_TASKS", 1)) in (1, args.num_machines):
        # Not a step of Slurm, or one task per machine, each of which starts its own processes.
        return None
    else:
        place = slurm_place(environment)
    if (args.num_gpus or 1) > 1 or args.num_machines > 1:
        raise LaunchError(
            f"{place.launcher} has started {place.world_size} processes, and --num-gpus "
            f"{args.num_gpus or 1} --num-machines {args.num_machines} would start more in each: "
            "leave these options out, or start this program once on each machine"
        )
    return place


def torchrun_place(environment: Mapping[str, str]) -> Place:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Place("torchrun", *(int(required(environment, name)) for name in names), "env://")


def slurm_place(environment: Mapping[str, str]) -> Place:
    """Return the place of a task of ``srun``; all meet on the machine of rank 0, the first.

    ``MASTER_ADDR`` and ``MASTER_PORT`` set another machine and port.
    """
    # 8 or 8(x2); 8,4 if the machines differ.
    tasks = required(environment, "SLURM_STEP_TASKS_PER_NODE")
    same = re.fullmatch(r"(\d+)(\(x\d+\))?", tasks)
    if same is None:
        raise LaunchError(
            f"Slurm runs {tasks} tasks on its machines, but each needs the same number: "
            "give --nodes and --ntasks-per-node"
        )
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    rank, world_size, local_rank = (int(required(environment, name)) for name in names)
    local_size = int(same[1])
    if rank % local_size != local_rank:
        raise LaunchError(
            f"Slurm's task {rank} is number {local_rank} of the {local_size} on its machine, but "
            "tasks must be numbered machine by machine: srun --distribution=block"
        )
    # The first number of each bracket: gpu[03-05,09],cpu1 -> gpu03,cpu1
    nodes = re.sub(r"\[(\w+)[^]]*\]", r"\1", required(environment, "SLURM_STEP_NODELIST"))
    address = environment.get("MASTER_ADDR", nodes.split(",")[0])
    job = int(required(environment, "SLURM_JOB_ID"))
    port = environment.get("MASTER_PORT", SLURM_PORTS[job % len(SLURM_PORTS)])
    return Place("Slurm", rank, world_size, local_rank, local_size, f"tcp://{address}:{port}")


def required(environment: Mapping[str, str], name: str) -> str:
    try:
        return environment[name]
    except KeyError:
        raise LaunchError(
            f"{name} is not set in the environment: start this program with torchrun or srun, "
            "which set it"
        ) from None


def join(place: Place) -> None:
    """Join the job's processes, each on its own GPU if there are GPUs.

    Raises:
        LaunchError: this machine has too few GPUs.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        if place.local_size > torch.cuda.device_count():
            raise LaunchError(
                f"{place.launcher} runs {place.local_size} processes on this machine, where "
                f"{torch.cuda.device_count()} GPUs are visible: start as many processes as there "
                "are GPUs, and let each see all of them (in Slurm without --gpus-per-task and "
                "--gpu-bind)"
            )
        torch.cuda.set_device(place.local_rank)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=place.init_method,
        world_size=place.world_size,
        rank=place.rank,
        timeout=DEFAULT_TIMEOUT,
    )
    comm.create_local_process_group(place.local_size)
    comm.synchronize()
