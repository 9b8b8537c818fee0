"""Run the CUDA kernels on the CPU, every thread of every block.

The sources of ``kernels/cuda`` are compiled with the CUDA built-ins of ``tests/harness/shim``,
which check every access to memory, and loaded as operators for tensors in "device memory"::

    with cuda_harness.device_memory():
        value = value.clone()
        output = cuda_harness.operator("ms_deform_attn", arch=90)(value, ...)

Objects and libraries are built once, in ``build/harness``. Their names contain a hash of their
ingredients: a changed source is compiled again, and concurrent sessions share the rest.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
HARNESS = ROOT / "tests" / "harness"
SHIM = HARNESS / "shim"
BUILD = ROOT / "build" / "harness"

PROCESSES = 2
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)

# -fno-strict-aliasing: kernels access the same bytes as several types, which nvcc allows.
# -fno-gnu-unique: libraries of different architectures must not share inline functions' statics.
# -U_FORTIFY_SOURCE: its longjmp refuses to change stacks.
COMPILE = (
    "-std=c++20 -O1 -fPIC -fno-strict-aliasing -fno-gnu-unique -U_FORTIFY_SOURCE "
    f"-Wall -Wno-unknown-pragmas -D_GLIBCXX_USE_CXX11_ABI={torch.compiled_with_cxx11_abi():d}"
).split()
# -Bsymbolic: no library takes functions of the same name from another. -z defs: none is missing.
LINK = "-shared -Wl,-Bsymbolic -Wl,-z,defs -Wl,-rpath,$ORIGIN".split()

ARCHITECTURES = (80, 90)

RUNTIME = ("block", "device_memory", "faults", "fiber", "launch", "python", "schedule")
# The harness's own kernels: some with planted faults, some that only call built-ins.
PLANTED = ("planted", "builtins")
Size = tuple[int, int, int]


class Source(NamedTuple):
    path: Path
    macros: tuple[str, ...] = ()


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def _missing_reason() -> str | None:
    if sys.platform != "linux":
        return "the CUDA harness needs Linux"
    if shutil.which(compiler()[0]) is None:
        return f"the CUDA harness needs a C++ compiler, and {shlex.join(compiler())} is not found"
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        return "the CUDA harness changes stacks, which AddressSanitizer does not follow"
    return None


needs_harness = pytest.mark.skipif(_missing_reason() is not None, reason=str(_missing_reason()))


@functools.cache
def _runtime() -> Path:
    library = build("runtime", [Source(HARNESS / f"{name}.cpp") for name in RUNTIME])
    ctypes.CDLL(str(library))
    return library


def _call(name: str, *arguments: str | int) -> object:
    _runtime()
    return getattr(torch.ops.lite_detr_harness, name)(*arguments)


def load(name: str, sources: Sequence[Source]) -> None:
    """Load a library of kernels and of the operators that launch them."""
    ctypes.CDLL(str(build(name, sources, [_runtime()])))


def device_code(path: Path, arch: int) -> Source:
    # Architectures differ in their atomic additions of float32: float64 is compiled once.
    arch = max(ARCHITECTURES) if path.stem == "float64" else arch
    return Source(path, (f"__CUDA_ARCH__={10 * arch}",))


@functools.cache
def _operators(arch: int) -> torch._ops._OpNamespace:
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {ARCHITECTURES}, got {arch}")
    namespace = f"lite_detr_harness_sm{arch}"
    sources = [
        # It takes longest.
        Source(HARNESS / "host.cpp"),
        Source(HARNESS / "namespace.cpp", (f'LITE_DETR_HARNESS_NAMESPACE="{namespace}"',)),
        *(device_code(path, arch) for path in sorted(KERNELS.glob("cuda/*.cu"))),
    ]
    load(f"sm{arch}", sources)
    return getattr(torch.ops, namespace)


def operator(name: str, arch: int) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """Return the operator ``lite_detr::name`` with the kernels for one of `ARCHITECTURES`."""
    return getattr(_operators(arch), name)


@contextlib.contextmanager
def device_memory() -> Iterator[None]:
    """Let CPU tensors that are created in here live in device memory, which kernels can reach.

    Fresh memory of up to 64 MiB is NaN in every floating-point type. Larger tensors are zero, and
    take no memory of the machine until they are written to.
    """
    entered = _call("enter_device_memory")
    try:
        yield
    finally:
        if entered:
            _call("exit_device_memory")


def resident_bytes() -> int:
    """Return the memory of the machine that device memory takes."""
    return _call("resident_bytes")


class schedule(contextlib.AbstractContextManager):
    """Let threads run in ``"ascending"``, ``"descending"`` or ``"random"`` order.

    From now on, or until the end of a ``with`` statement, as `torch.set_grad_enabled` does.
    """

    current = ("ascending", 0)

    def __init__(self, order: str, seed: int = 0) -> None:
        _call("set_order", order, seed)
        self.previous, schedule.current = schedule.current, (order, seed)

    def __exit__(self, *error: object) -> None:
        schedule(*self.previous)


def counters() -> list[dict[str, int]]:
    """Return what the threads of each launch since the last call did, in total.

    These are accesses and bytes of loads, stores and atomic additions, and calls of shuffles.
    """
    return [dict(launch) for launch in _call("counters")]


@functools.cache
def _planted() -> Callable[..., None]:
    sources = [
        *(device_code(HARNESS / f"{name}.cu", arch=90) for name in PLANTED),
        Source(HARNESS / "planted_operators.cpp"),
    ]
    load("planted", sources)
    return torch.ops.lite_detr_harness_planted.run


def to_device(tensor: Tensor) -> Tensor:
    """Copy a tensor to device memory, with the same strides and storage offset."""
    with device_memory():
        storage = torch.empty(tensor.untyped_storage().nbytes(), dtype=torch.uint8)
        storage.untyped_storage().copy_(tensor.untyped_storage())
        copy = torch.empty(0, dtype=tensor.dtype)
    return copy.set_(
        storage.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with device_memory():
        return torch.empty(*shape, dtype=dtype)


def launch_planted(
    kernel: str,
    input: Tensor,
    output: Tensor,
    grid: Size = (1, 1, 1),
    block: Size = (32, 1, 1),
    **shuffle: int,
) -> None:
    """Launch a kernel; ``shuffle`` may be its ``argument`` and ``width``."""
    _planted()(kernel, input, output, grid, block, **shuffle)


def run_planted(
    kernel: str, input: Tensor | None = None, size: int = 32, **options: Size | int
) -> Tensor:
    """Return a kernel's output of ``size`` floats; the default input is 0, 1, 2, ..."""
    if input is None:
        input = torch.arange(size, dtype=torch.float32)
    output = on_device(size)
    launch_planted(kernel, to_device(input), output, **options)
    return output


def build(name: str, sources: Sequence[Source], libraries: Sequence[Path] = ()) -> Path:
    """Build a shared library, linked to PyTorch and to other libraries that were built here."""
    objects = {_output(source.path.name, ".o", _ingredients(source)): source for source in sources}
    inputs = [*objects, *libraries]
    library = _output(f"lib{name}", ".so", [*LINK, *(path.name for path in inputs)])
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        # A session waits here while another builds, and then finds what it needs. Closing unlocks.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            missing = {path: source for path, source in objects.items() if not path.exists()}
            _run({path: _compile_arguments(source) for path, source in missing.items()})
            name_in_library = f"-Wl,-soname,{library.name}"
            _run({library: [*LINK, name_in_library, *map(str, inputs), *_torch_libraries()]})
    return library


def _run(commands: Mapping[Path, Sequence[str]]) -> None:
    """Run the compiler for each file. A file exists only when it is complete."""

    def make(path: Path) -> str:
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = Path(folder) / path.name
            command = [*compiler(), *commands[path], "-o", str(made)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                return f"{shlex.join(command)}\n{result.stdout}{result.stderr}"
            made.rename(path)
            return ""

    with ThreadPoolExecutor(PROCESSES) as executor:
        errors = list(filter(None, executor.map(make, commands)))
    if errors:
        raise RuntimeError("the CUDA harness does not build:\n" + "\n".join(errors))


def _compile_arguments(source: Source) -> list[str]:
    # Prints a warning where there is a CUDA toolkit but no GPU.
    from torch.utils import cpp_extension

    return [
        *COMPILE,
        *(f"-D{macro}" for macro in source.macros),
        f"-I{SHIM}",
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),
        *("-x", "c++", "-c", str(source.path)),
    ]


def _torch_libraries() -> list[str]:
    from torch.utils import cpp_extension

    return [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]


def _output(name: str, suffix: str, ingredients: Sequence[str]) -> Path:
    digest = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()
    return BUILD / f"{name}-{digest[:16]}{suffix}"


def _ingredients(source: Source) -> list[str]:
    files = _closure(source.path)
    return [_versions(), *COMPILE, *source.macros, *(path.read_text() for path in files)]


@functools.cache
def _versions() -> str:
    command = [*compiler(), "--version"]
    return torch.__version__ + subprocess.run(command, capture_output=True, text=True).stdout


def _closure(source: Path) -> list[Path]:
    """Return a source and all files of the project that it includes."""
    found = {source: None}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        for name in INCLUDE.findall(path.read_text()):
            for folder in (path.parent, SHIM):
                included = (folder / name).resolve()
                if included.is_file():
                    if included not in found:
                        found[included] = None
                        waiting.append(included)
                    break
    return list(found)
