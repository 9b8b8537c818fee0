"""The compiled operators, ``torch.ops.lite_detr``, if the package was built with them."""

import importlib.util
import logging

import torch
from torch import Tensor

from .checks import check_key_aware, check_msda, check_saved

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


def register_fakes() -> None:
    """Register the shapes of the results for tracers, and checks of the arguments.

    These functions also run if any tensor is on the meta device: unless they check all devices, a
    call with tensors of several devices returns memory that nothing has written to.
    """

    @torch.library.register_fake("lite_detr::ms_deform_attn")
    def _(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
        check_msda(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
        batch, _, heads, channels = value.shape
        return value.new_empty(batch, sampling_locations.shape[1], heads * channels)

    @torch.library.register_fake("lite_detr::ms_deform_attn_backward")
    def _(
        grad_output,
        value,
        spatial_shapes,
        level_start_index,
        sampling_locations,
        attention_weights,
    ):
        check_msda(
            value,
            spatial_shapes,
            level_start_index,
            sampling_locations,
            attention_weights,
            grad_output,
        )
        return _like(value), _like(sampling_locations), _like(attention_weights)

    @torch.library.register_fake("lite_detr::key_aware_ms_deform_attn")
    def _(query, key, value, spatial_shapes, level_start_index, sampling_locations):
        check_key_aware(query, key, value, spatial_shapes, level_start_index, sampling_locations)
        batch, queries, heads, channels = query.shape
        exact = torch.float64 if value.dtype == torch.float64 else torch.float32
        return (
            value.new_empty(batch, queries, heads * channels),
            value.new_empty(batch, queries, heads, dtype=exact),
        )

    @torch.library.register_fake("lite_detr::key_aware_ms_deform_attn_backward")
    def _(
        grad_output,
        query,
        key,
        value,
        spatial_shapes,
        level_start_index,
        sampling_locations,
        output,
        logsumexp,
    ):
        check_key_aware(query, key, value, spatial_shapes, level_start_index, sampling_locations)
        check_saved(grad_output, value, sampling_locations, output, logsumexp)
        grad_key = value.new_empty(0) if key is None else _like(key)
        return _like(query), grad_key, _like(value), _like(sampling_locations)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


if AVAILABLE:
    register_fakes()
