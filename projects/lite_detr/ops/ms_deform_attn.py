"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, eq. 3)."""

import torch
from torch import Tensor

from . import native
from .checks import check_msda, level_sizes
from .sampling import sample_levels, sampling_dtype


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
