"""Runs the CUDA kernels on the CPU, every thread of every block.

The sources of ``kernels/cuda`` are compiled with the CUDA built-ins of ``tests/harness/shim``,
which check every access to memory, and loaded as operators for tensors in "device memory"::

    with cuda_harness.device_memory():
        value = value.clone()
        output = cuda_harness.operator("ms_deform_attn", arch=90)(value, ...)
"""

import contextlib
import ctypes
import functools
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from cuda_harness_build import HARNESS, KERNELS, Source, build, compiler

ARCHITECTURES = (80, 90)

RUNTIME = ("block", "device_memory", "faults", "fiber", "launch", "python", "schedule")


def _why_not() -> str | None:
    if sys.platform != "linux":
        return "the CUDA harness needs Linux"
    if shutil.which(compiler()[0]) is None:
        return f"the CUDA harness needs a C++ compiler, and {shlex.join(compiler())} is not found"
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        return "the CUDA harness changes stacks, which AddressSanitizer does not follow"
    return None


needs_harness = pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))


@functools.cache
def _runtime() -> Path:
    library = build("runtime", [Source(HARNESS / f"{name}.cpp") for name in RUNTIME])
    ctypes.CDLL(str(library))
    return library


def _call(name: str, *arguments: str | int) -> object:
    _runtime()
    return getattr(torch.ops.lite_detr_harness, name)(*arguments)


def load(name: str, sources: Sequence[Source]) -> None:
    """Loads a library of kernels, and of what registers operators that launch them."""
    ctypes.CDLL(str(build(name, sources, [_runtime()])))


def device_code(path: Path, arch: int) -> Source:
    return Source(path, (f"__CUDA_ARCH__={10 * arch}",))


@functools.cache
def _operators(arch: int) -> torch._ops._OpNamespace:
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {ARCHITECTURES}, got {arch}")
    namespace = f"lite_detr_harness_sm{arch}"
    wrappers = [path for path in sorted(KERNELS.glob("cuda/*.cpp")) if path.name != "library.cpp"]
    sources = [
        *(device_code(path, arch) for path in sorted(KERNELS.glob("cuda/*.cu"))),
        *(Source(path) for path in [*wrappers, KERNELS / "problem.cpp"]),
        Source(HARNESS / "operators.cpp", (f"LITE_DETR_HARNESS_NAMESPACE={namespace}",)),
    ]
    load(f"sm{arch}", sources)
    return getattr(torch.ops, namespace)


def operator(name: str, arch: int) -> Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]:
    """The operator ``lite_detr::name`` by the kernels for an architecture, of `ARCHITECTURES`."""
    return getattr(_operators(arch), name)


@contextlib.contextmanager
def device_memory() -> Iterator[None]:
    """CPU tensors that are made in here lie where kernels can reach them, and stay there.

    Fresh memory of up to 64 MiB is NaN in every floating-point type. Larger tensors are zero, and
    take no memory of the machine before they are written to.
    """
    entered = _call("enter_device_memory")
    try:
        yield
    finally:
        if entered:
            _call("exit_device_memory")


def resident_bytes() -> int:
    """The memory of the machine that device memory takes."""
    return _call("resident_bytes")


class schedule(contextlib.AbstractContextManager):
    """Lets threads run in ``"ascending"``, ``"descending"`` or ``"random"`` order.

    From now on, or to the end of a ``with`` statement, as `torch.set_grad_enabled` does.
    """

    current = ("ascending", 0)

    def __init__(self, order: str, seed: int = 0) -> None:
        _call("set_order", order, seed)
        self.previous, schedule.current = schedule.current, (order, seed)

    def __exit__(self, *error: object) -> None:
        schedule(*self.previous)


def counters() -> list[dict[str, int]]:
    """What the threads of each launch since the last call did, in all.

    Accesses and bytes of loads, stores and atomic additions, and calls of shuffles.
    """
    return [dict(launch) for launch in _call("counters")]
