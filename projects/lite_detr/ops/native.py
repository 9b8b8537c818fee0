"""The compiled operators, ``torch.ops.lite_detr``, if the package was built with them."""

import importlib.util
import logging

import torch
from torch import Tensor

from .registrations import register_derivatives, register_fakes

logger = logging.getLogger("lite_detr")


def load_library() -> str:
    """Load the extension; if that fails, log and return the reason."""
    spec = importlib.util.find_spec("lite_detr._C")
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
    logger.warning(
        "lite_detr's native operators are not available (%s); the PyTorch ones run instead, "
        "several times slower. docs/kernels.md says how to build them, and "
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


def runs_on(device: torch.device) -> bool:
    """Return whether the compiled operators take tensors on a device."""
    return device.type in DEVICES


def backend(device: torch.device | str = "cpu") -> str:
    """Return ``"native"`` if the compiled operators run on a device, else ``"pytorch"``."""
    return "native" if runs_on(torch.device(device)) else "pytorch"


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


if AVAILABLE:
    register_fakes()
    register_derivatives()
