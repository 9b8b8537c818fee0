"""The time and the memory of a call on a device, and the machine that this is."""

import argparse
import ctypes
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lite_detr import cli, ops
from lite_detr.errors import LiteDetrError

# A turn on a GPU has as many calls as take TURN_SECONDS, but no more than MOST_CALLS: a GPU's queue
# has room for about a thousand launches, and some calls take nearly a hundred.
TURN_SECONDS, MOST_CALLS = 0.01, 10
# More than any GPU's clock.
CYCLES_PER_SECOND = 2.5e9


def add_opts(parser: argparse.ArgumentParser) -> None:
    """Add ``--opts``: overrides of all configs, which may be followed by other options."""
    parser.add_argument(
        "--opts",
        nargs="+",
        type=cli.key_value,
        default=[],
        metavar="key=value",
        help="change values of the configs",
    )


def check_device(device: str, native: bool = False) -> None:
    """Check that the machine has what ``--device`` names.

    Args:
        native: check that there are native operators for it as well.

    Raises:
        LiteDetrError: it does not.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise LiteDetrError("--device cuda needs a GPU, and PyTorch finds none")
    if native and ops.backend(device) == "pytorch":
        raise LiteDetrError(
            f"there are no native operators for --device {device}; docs/kernels.md says how to "
            "build them"
        )


@contextmanager
def naming(case: str) -> Iterator[None]:
    """Turn an error of PyTorch, such as memory that runs out, into one line that names the case.

    Raises:
        LiteDetrError: the line.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LiteDetrError):
            raise
        raise LiteDetrError(f"{case}: {str(error).splitlines()[0]}") from error


def time_turn(function: Callable[[], object], device: str) -> list[float]:
    """Return the seconds of each call of a turn: one on the CPU, up to `MOST_CALLS` on a GPU."""
    if device == "cuda":
        return _time_turn_on_gpu(function)
    start = time.perf_counter()
    function()
    return [time.perf_counter() - start]


def _time_turn_on_gpu(function: Callable[[], object]) -> list[float]:
    """Time each call between two events, without the host's share of it.

    The L2 cache is overwritten before each call. All calls are queued before the first one runs, so
    that none waits for the host.
    """
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    queued = time.perf_counter() - start
    torch.cuda.synchronize()
    finished = time.perf_counter() - start

    calls = max(1, min(MOST_CALLS, int(TURN_SECONDS / finished)))
    cache_size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(2 * cache_size, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    # Private, but the only kernel that keeps a GPU busy for a given time.
    torch.cuda._sleep(int(2 * calls * queued * CYCLES_PER_SECOND))
    for before, after in events:
        flush.zero_()
        before.record()
        function()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in events]


def peak_memory(function: Callable[[], object], device: str) -> int | None:
    """Return the bytes at the peak of one call, above those before it; None if unknown."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = function()
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_bytes("VmRSS")
    results = function()
    del results
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def environment(device: str) -> dict:
    """Describe the machine and its software. What does not apply or is unknown is None."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    instruction_set = os.environ.get("LITE_DETR_CPU_CAPABILITY")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "instruction set": instruction_set or torch.backends.cpu.get_cpu_capability(),
        **(_gpu() if device == "cuda" else dict.fromkeys(GPU)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


GPU = ("gpu", "compute capability", "cuda", "driver", "clock, MHz", "highest clock, MHz")


def _gpu() -> dict:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = f"{properties.major}.{properties.minor}"
    told: list[str | int | None] = [None, None, None]
    if shutil.which("nvidia-smi"):
        # The clock of an idle GPU says nothing.
        torch.cuda._sleep(int(CYCLES_PER_SECOND))
        query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm"
        gpu = f"--id=GPU-{properties.uuid}"
        command = ["nvidia-smi", gpu, query, "--format=csv,noheader,nounits"]
        result = subprocess.run(command, capture_output=True, text=True)
        torch.cuda.synchronize()
        if result.returncode == 0:
            driver, *clocks = result.stdout.strip().split(", ")
            told = [driver, *(int(clock) if clock.isdigit() else None for clock in clocks)]
    return dict(zip(GPU, [properties.name, capability, torch.version.cuda, *told]))
