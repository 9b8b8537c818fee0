"""The compiled operators, ``torch.ops.lite_detr``: the extension's, or on GPUs NVRTC's."""

import functools
import importlib.util
import logging
import re
from collections.abc import Callable

import torch
from torch import Tensor

from . import nvrtc, nvrtc_operators
from .checks import FLOAT_DTYPES
from .nvrtc_kernels import kernels, load
from .registrations import register_derivatives, register_fakes

logger = logging.getLogger("lite_detr")


def load_library() -> str:
    """Load the extension; if that fails, log and return the reason."""
    # Beside this folder: it is also published under other names, without the extension.
    spec = importlib.util.find_spec(f"{__package__.rpartition('.')[0]}._C")
    if spec is None or spec.origin is None:
        reason = "the package was installed without them"
    else:
        try:
            torch.ops.load_library(spec.origin)
            return ""
        except OSError as error:
            # Most often, it was built for another version of PyTorch. PyTorch may only name the
            # file; the loader's error, which is then the cause, names the library or the symbol.
            reason = str(error.__cause__ or error)
            if "undefined symbol" in reason:
                reason = f"built for another PyTorch than {torch.__version__}: {reason}"
    logger.warning(
        "lite_detr's native operators are not available (%s); on CPUs the PyTorch ones run "
        "instead, several times slower. docs/kernels.md says how to build them, and "
        "`python -m lite_detr.collect_env` what this machine has",
        reason.splitlines()[0],
    )
    return reason


# The reason why the compiled operators are not available; empty if they are.
MISSING_REASON = load_library()
AVAILABLE = not MISSING_REASON
# The devices that the extension has kernels for: CUDA only if it was built with a toolkit.
DEVICES = tuple(
    device
    for device in ("cpu", "cuda")
    # A private function: PyTorch has no public one that tells which devices an operator has.
    if AVAILABLE
    and torch._C._dispatch_has_kernel_for_dispatch_key("lite_detr::ms_deform_attn", device.upper())
)


# GPUs whose kernels could not be compiled, by index.
FAILED: set[int] = set()


def constant(function: Callable) -> Callable:
    """Let torch.compile call a function while it traces, and take the result as a constant.

    By the attribute that ``torch.compiler.assume_constant_result`` sets, which imports the compiler
    first: that takes a second.
    """
    function._dynamo_marked_constant = True
    return function


@constant
def runs_on(device: torch.device) -> bool:
    """Return whether the compiled operators take tensors on a device."""
    return backend(device) != "pytorch"


def backend(device: torch.device | str = "cpu") -> str:
    """Return which operators run on a device.

    ``"native"`` are the extension's, ``"nvrtc"`` those whose kernels are compiled at their first
    use, and ``"pytorch"`` neither. For a GPU this initialises CUDA.
    """
    device = torch.device(device)
    if device.type == "cuda" and torch.version.cuda and torch.cuda.is_available():
        if device.index in FAILED:
            return "pytorch"
        return cuda_backend(torch.cuda.get_device_capability(device))
    return "native" if device.type in DEVICES else "pytorch"


@functools.cache
def cuda_backend(capability: tuple[int, int]) -> str:
    """Choose what runs on GPUs of a compute capability; warn if it is not what was built."""
    listed = torch.ops.lite_detr.cuda_architectures() if "cuda" in DEVICES else ""
    if covers(listed, capability):
        return "native"
    missing = "lite_detr has no extension with CUDA kernels"
    if listed:
        missing = (
            f"lite_detr's extension was built for GPUs of compute capability {name_gpus(listed)} "
            f"and not for {capability[0]}.{capability[1]}"
        )
    try:
        nvrtc.target(capability)
        nvrtc.environment()
    except nvrtc.Unavailable as error:
        logger.warning(
            "%s, and kernels cannot be compiled at run time (%s); the PyTorch operators run "
            "instead, several times slower: see docs/kernels.md",
            missing,
            error,
        )
        return "pytorch"
    if listed:
        logger.warning("%s; NVRTC compiles kernels at their first use instead", missing)
        REGISTERED.append(nvrtc_operators.register(define=False))
    return "nvrtc"


def covers(listed: str, capability: tuple[int, int]) -> bool:
    """Return whether an extension runs on GPUs of a compute capability.

    Args:
        listed: what it was built for, such as ``800,900/900``. Machine code runs on later GPUs of
            its generation; the PTX after the stroke on all later ones.
    """
    number = 100 * capability[0] + 10 * capability[1]
    codes, ptx = (list(map(int, re.findall(r"\d+", part))) for part in listed.partition("/")[::2])
    same_generation = [code for code in codes if code // 100 == capability[0]]
    return any(code <= number for code in same_generation + ptx)


def name_gpus(listed: str) -> str:
    """``800,900/900`` -> ``8.0, 9.0 and PTX of 9.0``."""
    codes, ptx = (re.findall(r"(\d+)(\d)\d", part) for part in listed.partition("/")[::2])
    named = ", ".join(map(".".join, codes))
    return f"{named} and PTX of {', '.join(map('.'.join, ptx))}" if ptx else named


def has_kernels(
    value: Tensor, attention: str, fused: bool = False, shared: bool | None = None
) -> bool:
    """Return whether the compiled operator takes a value on a device that they run on.

    Where NVRTC compiles kernels, it does so now, before tracers and CUDA graphs see the operator.

    Args:
        attention: ``msda`` or ``key_aware``.
        shared: whether the values are the keys; None if there are no keys.
    """
    if value.device.type != "cuda" or value.dim() != 4 or value.dtype not in FLOAT_DTYPES:
        # Operators themselves refuse what is wrong.
        return True
    gradients = torch.is_grad_enabled()
    return compiles(value.device, attention, fused, value.dtype, value.shape[3], shared, gradients)


@constant
def compiles(device: torch.device, *kernel: str | bool | int | torch.dtype | None) -> bool:
    return backend(device) == "native" or compile_kernels(device.index, *kernel)


@functools.cache
def compile_kernels(
    device: int,
    attention: str,
    fused: bool,
    dtype: torch.dtype,
    channels: int,
    shared: bool | None,
    gradients: bool,
) -> bool:
    try:
        wanted = kernels(attention, fused, dtype, channels, shared)
    except ValueError:
        return True
    try:
        for kernel in wanted[: 1 + gradients]:
            load(kernel, device)
    except nvrtc.Unavailable as error:
        FAILED.add(device)
        logger.warning(
            "%s; the PyTorch operators run on cuda:%d instead, several times slower", error, device
        )
        return False
    return True


def autocast(device: torch.device, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast tensors as autocast on a device casts those of a matrix product; float64 stays.

    In Python, as autocast casts all arguments of an operator or none: locations must stay float32,
    since 16 bits cannot tell neighbouring cells of a wide map apart.
    """
    if not torch.is_autocast_enabled(device.type):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(
        tensor.to(dtype) if tensor is not None and is_cast(tensor) else tensor for tensor in tensors
    )


def autocast_locations(device: torch.device, locations: Tensor) -> Tensor:
    """Cast locations or reference points to float32 under autocast; float64 stays."""
    if torch.is_autocast_enabled(device.type) and is_cast(locations):
        return locations.float()
    return locations


def is_cast(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64


# What must live as long as the operators that Python registers.
REGISTERED = []
if torch.version.cuda and "cuda" not in DEVICES:
    REGISTERED.append(nvrtc_operators.register(define=not AVAILABLE))
if AVAILABLE or REGISTERED:
    register_fakes()
    register_derivatives()
