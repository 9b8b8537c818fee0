"""The compiled operators, ``torch.ops.lite_detr``, where the package was built with them."""

import importlib.util
import logging

import torch
from torch import Tensor

from .checks import check_key_aware, check_plain, check_value

logger = logging.getLogger("lite_detr")


def load_library() -> str:
    """Loads the extension. Where it cannot, says so in the log and returns the reason."""
    spec = importlib.util.find_spec("lite_detr._C")
    if spec is None or spec.origin is None:
        reason = "the package was installed without them"
    else:
        try:
            torch.ops.load_library(spec.origin)
            return ""
        except OSError as error:
            # Built for another version of PyTorch, most often. PyTorch may name the file alone; the
            # loader, whose error is then the cause of PyTorch's, names the library or the symbol.
            reason = str(error.__cause__ or error)
    logger.warning(
        "lite_detr's native operators are not at hand (%s); the PyTorch ones run instead, several "
        "times slower. docs/kernels.md says how to build them, and `python -m "
        "lite_detr.collect_env` what is on this machine",
        reason.splitlines()[0],
    )
    return reason


# Why the compiled operators are not at hand; empty where they are.
WHY_NOT = load_library()
AVAILABLE = not WHY_NOT
# The devices that the extension has kernels for: one without CUDA kernels registers none.
DEVICES = tuple(
    device
    for device in ("cpu", "cuda")
    if AVAILABLE
    and torch._C._dispatch_has_kernel_for_dispatch_key("lite_detr::ms_deform_attn", device.upper())
)


def runs_on(device: torch.device) -> bool:
    """Whether tensors on a device are for the compiled operators."""
    return device.type in DEVICES


def backend(device: torch.device | str = "cpu") -> str:
    """``"native"`` where the compiled operators run on a device, ``"pytorch"`` elsewhere."""
    return "native" if runs_on(torch.device(device)) else "pytorch"


def register_fakes() -> None:
    """Tells tracers the shapes of the results, and checks what can be known of the arguments."""

    @torch.library.register_fake("lite_detr::ms_deform_attn")
    def _(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
        check_value("value", value)
        check_plain(value, sampling_locations, attention_weights, spatial_shapes.shape[0])
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
        return _like(value), _like(sampling_locations), _like(attention_weights)

    @torch.library.register_fake("lite_detr::key_aware_ms_deform_attn")
    def _(query, key, value, spatial_shapes, level_start_index, sampling_locations):
        check_value("value", value)
        check_key_aware(query, key, value, sampling_locations, spatial_shapes.shape[0])
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
        grad_key = value.new_empty(0) if key is None else _like(key)
        return _like(query), grad_key, _like(value), _like(sampling_locations)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


if AVAILABLE:
    register_fakes()
