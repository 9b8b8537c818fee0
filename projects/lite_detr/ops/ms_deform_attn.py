"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, eq. 3)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import native
from .checks import check_fused_msda, check_msda, level_sizes
from .sampling import flatten, locate_on_levels, sample_levels, sampling_dtype


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Return the weighted sum of bilinearly sampled values, for each query and head.

    Args:
        value: ``[B, S, M, D]``, the tokens of all levels, ``M`` heads of width ``D``.
        spatial_shapes: ``[L, 2]`` int64, ``(H_l, W_l)`` of each level, ``S = sum(H_l * W_l)``.
        level_start_index: ``[L]`` int64, the token at which each level starts.
        sampling_locations: ``[B, Q, M, L, P, 2]``, ``(x, y)`` in ``[0, 1]`` across each level;
            outside the map, values are zero. The value's dtype or float32.
        attention_weights: ``[B, Q, M, L, P]``, usually a softmax over ``L * P``.

    Returns:
        ``[B, Q, M * D]`` in the value's dtype.

    Raises:
        ValueError: a shape, device or level size does not fit.
        TypeError: a dtype does not fit.
    """
    if native.runs_on(value.device):
        value, attention_weights = native.autocast(value.device, value, attention_weights)
        sampling_locations = native.autocast_locations(value.device, sampling_locations)
        if native.has_kernels(value, "msda"):
            return torch.ops.lite_detr.ms_deform_attn(
                value, spatial_shapes, level_start_index, sampling_locations, attention_weights
            )
    return ms_deform_attn_pytorch(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )


def ms_deform_attn_pytorch(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute :func:`ms_deform_attn` by ``grid_sample``, with second derivatives."""
    check_msda(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    sizes = level_sizes(spatial_shapes, level_start_index, value.shape[1])
    dtype = sampling_dtype(value.dtype)
    sampled = sample_levels(value.to(dtype), sizes, sampling_locations.to(dtype))
    weights = attention_weights.to(dtype).flatten(-2).transpose(1, 2).unsqueeze(2)
    output = (sampled * weights).sum(-1)  # [B, M, D, Q]
    return output.permute(0, 3, 1, 2).flatten(2).to(value.dtype)


def fused_ms_deform_attn(
    value: Tensor,
    sizes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Compute :func:`ms_deform_attn` from what a layer regresses, in one pass.

    Neither the locations nor the weights, a softmax over ``L * P``, are written to memory.

    Args:
        value: ``[B, S, M, D]``, the tokens of all levels, ``M`` heads of width ``D``.
        sizes: ``(height, width)`` of each level.
        reference_points: ``[B, Q, L, 2]`` points or ``[B, Q, L, 4]`` boxes (cx, cy, w, h), in
            ``[0, 1]`` across each level. The value's dtype or float32.
        sampling_offsets: ``[B, Q, M, L, P, 2]``; their unit is a cell around a point, and the half
            extent over ``P`` around a box.
        attention_logits: ``[B, Q, M, L, P]``

    Returns:
        ``[B, Q, M * D]`` in the value's dtype.

    Raises:
        ValueError: a shape, device or level size does not fit.
        TypeError: a dtype does not fit.
    """
    # torch.jit.trace would record the sizes as constants.
    if native.runs_on(value.device) and not torch.jit.is_tracing():
        value, sampling_offsets, attention_logits = native.autocast(
            value.device, value, sampling_offsets, attention_logits
        )
        reference_points = native.autocast_locations(value.device, reference_points)
        if native.has_kernels(value, "msda", fused=True):
            return torch.ops.lite_detr.fused_ms_deform_attn(
                value, flatten(sizes), reference_points, sampling_offsets, attention_logits
            )
    return _in_steps(
        ms_deform_attn, value, sizes, reference_points, sampling_offsets, attention_logits
    )


def fused_ms_deform_attn_pytorch(
    value: Tensor,
    sizes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Compute :func:`fused_ms_deform_attn` by ``grid_sample``, with second derivatives."""
    return _in_steps(
        ms_deform_attn_pytorch, value, sizes, reference_points, sampling_offsets, attention_logits
    )


def _in_steps(
    operator: Callable[..., Tensor],
    value: Tensor,
    sizes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    check_fused_msda(value, flatten(sizes), reference_points, sampling_offsets, attention_logits)
    places = locate_on_levels(sizes, reference_points, sampling_offsets)
    weights = attention_logits.flatten(3).softmax(-1).to(value.dtype).view_as(attention_logits)
    return operator(value, *places, weights)
