"""Count the cores of this machine or container, and share them among processes."""

import os
from pathlib import Path

# The quota of a container's processor time and its period, in cgroups of version 2.
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def count_cores() -> int:
    """Return the number of cores that this process may use, in a container as well."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return max(min(cores, int(quota) // int(period)), 1)
    # Not in a container of this kind, or its quota is "max".
    except (OSError, ValueError):
        return cores


def limit_threads() -> None:
    """Let PyTorch start no more threads than a container has cores.

    PyTorch starts one for each core of the machine: with 2 of 64 cores, 62 would wait for the other
    two in every operator. The environment variable ``OMP_NUM_THREADS`` has the last word.
    """
    # Late, as below.
    import torch

    cores = count_cores()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


def share_cores(batch_size: int) -> int:
    """Return the number of processes to train in on a CPU, and set the threads of each.

    Args:
        batch_size: the images of an iteration.
    """
    # Late: a command counts cores before it imports PyTorch.
    import torch

    processes, threads = divide_cores(batch_size, os.environ.get("OMP_NUM_THREADS"))
    # For the processes to come, and for this one.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    return processes


def divide_cores(batch_size: int, threads: str | None) -> tuple[int, int]:
    """Return the number of processes to train in on a CPU, and of the threads of each.

    As many processes as the cores and the images of an iteration allow: two threads of one process
    wait for each other thousands of times an iteration, and much longer beside another program,
    while two processes wait once.

    Args:
        batch_size: the images of an iteration; each process has the same number.
        threads: the variable ``OMP_NUM_THREADS``; None shares all cores among the processes.
    """
    cores = count_cores()
    # OpenMP also accepts a list, with a number for each level of nesting.
    outer = (threads or "").split(",")[0].strip()
    fixed = int(outer) if outer.isdigit() else 0
    limit = max(cores // (fixed or 1), 1)
    processes = next(n for n in range(min(limit, batch_size), 0, -1) if batch_size % n == 0)
    return processes, fixed or max(cores // processes, 1)
