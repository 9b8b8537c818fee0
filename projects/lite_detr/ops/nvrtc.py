"""Compile the package's CUDA kernels at run time, by NVRTC, and launch them.

Through cuda-bindings, which PyTorch installs with NVRTC and CUDA's headers since 2.10; any PyTorch
takes it. PyTorch's own ``torch.cuda._compile_kernel`` is private, passes no structs and keeps no
compiled kernels.

Cubins are kept in ``LITE_DETR_CACHE``, or else in ``lite_detr`` in the user's cache folder.
"""

import ctypes
import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

logger = logging.getLogger("lite_detr")

# In a checkout, a link to the folder that the extension is built from.
SOURCES = Path(__file__).parents[1] / "kernels"
# The oldest GPUs that the kernels are written for.
OLDEST = 75
# NVRTC has no standard library; this is what the kernels take of it. Of CUDA's runtime it knows
# what device code needs; the two types are of host functions that are only declared.
HEADERS = {
    "cfloat": "#define FLT_MAX 3.402823466e+38f\n#define DBL_MAX 1.7976931348623157e+308\n",
    "cstdint": """
using int32_t = int;
using int64_t = long long;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
#define INT32_MAX 2147483647
""",
    "cstring": "namespace std { using ::memcpy; }\n",
    "type_traits": """
namespace std {
template <bool kFirst, typename First, typename Second>
struct conditional { using type = First; };
template <typename First, typename Second>
struct conditional<false, First, Second> { using type = Second; };
template <bool kFirst, typename First, typename Second>
using conditional_t = typename conditional<kFirst, First, Second>::type;
struct true_type { constexpr bool operator()() const { return true; } };
struct false_type { constexpr bool operator()() const { return false; } };
}
""",
    "cuda_runtime.h": "",
    "cuda_runtime_api.h": "#define cudaError_t int\n#define cudaStream_t void*\n",
}
GUARDED = {name: f"#pragma once\n{text}" for name, text in HEADERS.items()}


class Unavailable(RuntimeError):
    """Kernels cannot be compiled or loaded; the message is the reason, in one line."""


class Program(NamedTuple):
    """A source, and the expressions in C++ that name the kernels which it is compiled for."""

    name: str
    source: str
    expressions: tuple[str, ...]


class Binary(NamedTuple):
    """A cubin, or PTX for a GPU newer than NVRTC, and the names of the kernels in it."""

    code: bytes
    names: tuple[str, ...]


@functools.cache
def bindings() -> tuple[ModuleType, ModuleType]:
    """Return cuda-bindings' modules of the driver and of NVRTC.

    Raises:
        Unavailable: they are not installed, or NVRTC does not load.
    """
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError:
        major = str(torch.version.cuda).split(".")[0]
        raise Unavailable(
            f"cuda-bindings is not installed: pip install 'cuda-bindings=={major}.*'"
        ) from None
    try:
        nvrtc.nvrtcVersion()
    # As cuda-bindings reports a library that is missing or does not load.
    except RuntimeError as error:
        raise Unavailable(f"NVRTC does not load: {str(error).splitlines()[0]}") from error
    return driver, nvrtc


def checked(result: tuple):
    """Return what a call of cuda-bindings returned beside its status.

    Raises:
        RuntimeError: the status is an error.
    """
    status, *values = result
    if status != 0:
        raise RuntimeError(f"CUDA error: {status.name}")
    return values[0] if values else None


@functools.cache
def include_folder() -> Path:
    """Find CUDA's headers: those in PyTorch's pip packages, or else a toolkit's."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in spec.submodule_search_locations] if spec else []
    folders = [folder for root in roots for folder in sorted(root.glob("*/include"))]
    folders += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include")]
    for folder in folders:
        if (folder / "cuda_bf16.h").exists():
            return folder
    raise Unavailable(f"cuda_bf16.h is in none of {', '.join(map(str, folders))}")


def target(capability: tuple[int, int]) -> str:
    """Return what to compile for: a GPU's own code, or the newest PTX that NVRTC knows.

    Raises:
        Unavailable: the GPU is older than the kernels or than NVRTC.
    """
    number, (_, nvrtc) = 10 * capability[0] + capability[1], bindings()
    known = [known for known in checked(nvrtc.nvrtcGetSupportedArchs()) if known <= number]
    oldest = f"{OLDEST // 10}.{OLDEST % 10}"
    if number < OLDEST:
        raise Unavailable(
            f"the GPU has compute capability {number // 10}.{number % 10}, and the kernels need "
            f"{oldest} or later"
        )
    if not known:
        raise Unavailable(f"NVRTC does not know compute capability {number // 10}.{number % 10}")
    kind = "sm" if max(known) // 10 == capability[0] else "compute"
    return f"{kind}_{max(known)}"


def compile_program(program: Program, architecture: str, *options: str) -> tuple[Binary, str]:
    """Compile a program for a target such as ``sm_90``, and return NVRTC's log as well.

    Raises:
        Unavailable: it does not compile.
    """
    _, nvrtc = bindings()
    headers = [[text.encode() for text in texts] for texts in (GUARDED.values(), GUARDED)]
    handle = checked(
        nvrtc.nvrtcCreateProgram(
            program.source.encode(), program.name.encode(), len(GUARDED), *headers
        )
    )
    try:
        for expression in program.expressions:
            checked(nvrtc.nvrtcAddNameExpression(handle, expression.encode()))
        # The first: host functions in headers are taken as device functions.
        flags = ["-default-device", "-std=c++17", f"-arch={architecture}", *options]
        flags += [f"-I{folder}" for folder in (SOURCES, include_folder())]
        (status,) = nvrtc.nvrtcCompileProgram(handle, len(flags), [f.encode() for f in flags])
        log = bytearray(checked(nvrtc.nvrtcGetProgramLogSize(handle)))
        checked(nvrtc.nvrtcGetProgramLog(handle, log))
        text = log.rstrip(b"\0").decode(errors="replace")
        if status != 0:
            first = re.search(r"^.*\berror\b.*$", text, re.MULTILINE)
            reason = first[0].strip() if first else f"{status.name} {text[:200].strip()}"
            raise Unavailable(f"{program.name} does not compile for {architecture}: {reason}")
        kind = "CUBIN" if architecture.startswith("sm") else "PTX"
        code = bytearray(checked(getattr(nvrtc, f"nvrtcGet{kind}Size")(handle)))
        checked(getattr(nvrtc, f"nvrtcGet{kind}")(handle, code))
        names = [
            checked(nvrtc.nvrtcGetLoweredName(handle, expression.encode())).decode()
            for expression in program.expressions
        ]
    finally:
        nvrtc.nvrtcDestroyProgram(handle)
    return Binary(bytes(code), tuple(names)), text


def cached_binary(program: Program, architecture: str) -> Binary:
    """Return a compiled program from the cache folder, or compile it and put it there."""
    ingredients = (*program, architecture, *environment(), *GUARDED.values())
    digest = hashlib.sha256(repr(ingredients).encode()).hexdigest()
    path = None
    try:
        path = cache_folder() / f"{Path(program.name).stem}-{architecture}-{digest[:32]}"
        if binary := read_binary(path):
            return binary
    except (OSError, RuntimeError) as error:
        logger.debug("no cache of CUDA kernels: %s", error)
    binary, _ = compile_program(program, architecture)
    if path is not None:
        write_binary(path, binary)
    return binary


def cache_folder() -> Path:
    """Return where cubins are kept.

    Raises:
        RuntimeError: the user has no home.
    """
    if given := os.environ.get("LITE_DETR_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lite_detr"


@functools.cache
def environment() -> tuple[str, ...]:
    """Return what compiled code depends on beside its program: another one is compiled again."""
    driver, nvrtc = bindings()
    sources = sorted(path for path in SOURCES.rglob("*") if path.suffix in (".h", ".cuh"))
    if not sources:
        raise Unavailable(f"{SOURCES} has no sources")
    # PyTorch's version stands for that of CUDA's headers, which it requires.
    versions = (torch.__version__, str(include_folder()), str(nvrtc.nvrtcVersion()))
    try:
        versions += (str(driver.cuDriverGetVersion()),)
    # Compiling works without a driver.
    except RuntimeError:
        versions += ("no driver",)
    return *versions, *(path.read_text() for path in sources)


def read_binary(path: Path) -> Binary | None:
    """Return a kept binary; None if there is none, or if the file is damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, body = content[:32], content[32:]
    if hashlib.sha256(body).digest() != digest:
        logger.debug("%s is damaged; its kernel is compiled again", path)
        return None
    names, _, code = body.partition(b"\n")
    return Binary(code, tuple(json.loads(names)))


def write_binary(path: Path, binary: Binary) -> None:
    """Keep a binary, if the folder can be written to. The file appears when it is complete."""
    body = json.dumps(binary.names).encode() + b"\n" + binary.code
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(body).digest() + body)
        os.replace(file.name, path)
    except OSError as error:
        # It takes a fraction of a second in each process.
        logger.debug("a compiled CUDA kernel is not kept: %s", error)


def enter_context(device: int) -> None:
    """Make PyTorch's context of a device current, if the thread has none yet.

    PyTorch does so when it first calls CUDA's runtime, which a thread of autograd may not have.
    """
    driver, _ = bindings()
    if not int(checked(driver.cuCtxGetCurrent())):
        handle = checked(driver.cuDeviceGet(device))
        checked(driver.cuCtxSetCurrent(checked(driver.cuDevicePrimaryCtxRetain(handle))))


def load(program: Program, device: int) -> tuple[object, tuple[str, ...]]:
    """Return the first kernel of a program, loaded to a device, and the names of all.

    Raises:
        Unavailable: it does not compile or load.
    """
    architecture = target(torch.cuda.get_device_capability(device))
    binary = cached_binary(program, architecture)
    driver, _ = bindings()
    with torch.cuda.device(device):
        enter_context(device)
        try:
            module = checked(driver.cuModuleLoadData(binary.code))
        except RuntimeError as error:
            raise Unavailable(
                f"the driver does not load {program.name} for {architecture}: {error}"
            ) from error
        return checked(driver.cuModuleGetFunction(module, binary.names[0].encode())), binary.names


def launch(
    function: object,
    grid: Sequence[int],
    threads: int,
    arguments: ctypes.Structure,
    device: torch.device,
) -> None:
    """Launch a kernel of one argument on PyTorch's current stream, without waiting for it."""
    driver, _ = bindings()
    enter_context(device.index)
    stream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    # Neither shared memory nor the packed form of arguments.
    checked(
        driver.cuLaunchKernel(
            function, *grid, threads, 1, 1, 0, stream, ctypes.addressof(pointers), 0
        )
    )
