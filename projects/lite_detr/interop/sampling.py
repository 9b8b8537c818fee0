"""The sampling functions of other projects, by their names and signatures, on our operators."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import ms_deform_attn
from .levels import exact_dtype


def ms_deform_attn_core_pytorch(
    value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sample as the function of this name in Deformable-DETR, DINO and Mask2Former does.

    MMCV, detrex and Grounding DINO call it ``multi_scale_deformable_attn_pytorch``, and
    transformers ``multi_scale_deformable_attention``.

    Args:
        value: ``[B, S, M, D]``
        value_spatial_shapes: ``[L, 2]``, ``(H_l, W_l)``: a tensor of any integer dtype, or a list.
        sampling_locations: ``[B, Q, M, L, P, 2]`` of any floating-point dtype.
        attention_weights: ``[B, Q, M, L, P]`` of any floating-point dtype.

    Returns:
        ``[B, Q, M * D]`` in the value's dtype.
    """
    return _sample(value, value_spatial_shapes, None, sampling_locations, attention_weights)


multi_scale_deformable_attn_pytorch = ms_deform_attn_core_pytorch
multi_scale_deformable_attention = ms_deform_attn_core_pytorch


def multi_scale_deformable_attention_v2(
    value: Tensor,
    value_spatial_shapes: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    """Sample as RT-DETRv2 and D-FINE do, whose levels may have different numbers of points.

    Args:
        sampling_locations: ``[B, Q, M, N, 2]``, the points of all levels.
        attention_weights: ``[B, Q, M, N]``
        num_points_list: the number of points on each level, ``N`` in all.
        method: ``default``, which is bilinear.

    Raises:
        ValueError: ``method`` is another one.
    """
    if method != "default":
        raise ValueError(f"the method must be 'default', which samples bilinearly, got {method!r}")
    most = max(num_points_list)
    locations: list[Tensor] = []
    weights: list[Tensor] = []
    # Points that are added, a map's width beside the map, cost no memory access and change nothing.
    for count, location, weight in zip(
        num_points_list,
        sampling_locations.split(list(num_points_list), dim=3),
        attention_weights.split(list(num_points_list), dim=3),
    ):
        locations.append(F.pad(location, (0, 0, 0, most - count), value=-1.0))
        weights.append(F.pad(weight, (0, most - count)))
    return _sample(
        value,
        value_spatial_shapes,
        None,
        torch.stack(locations, dim=3),
        torch.stack(weights, dim=3),
    )


class MSDeformAttnFunction:
    """Stands for the autograd function of this name of Deformable-DETR and all that copied it.

    BEVFormer, MMCV, detrex and Grounding DINO call it ``MultiScaleDeformableAttnFunction``.
    """

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Any,
        value_level_start_index: Any,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """Sample as :func:`ms_deform_attn_core_pytorch` does; ``im2col_step`` has no effect."""
        return _sample(
            value,
            value_spatial_shapes,
            value_level_start_index,
            sampling_locations,
            attention_weights,
        )


MultiScaleDeformableAttnFunction = MSDeformAttnFunction
MultiScaleDeformableAttnFunction_fp32 = MSDeformAttnFunction
MultiScaleDeformableAttnFunction_fp16 = MSDeformAttnFunction


def _sample(value: Tensor, shapes: Any, starts: Any, locations: Tensor, weights: Tensor) -> Tensor:
    spatial_shapes = _as_int64(shapes, value)
    if starts is None:
        sizes = spatial_shapes.prod(1)
        level_start_index = sizes.cumsum(0) - sizes
    else:
        level_start_index = _as_int64(starts, value)
    if locations.dtype != value.dtype:
        locations = locations.to(exact_dtype(value.dtype))
    return ms_deform_attn(
        value, spatial_shapes, level_start_index, locations, weights.to(value.dtype)
    )


def _as_int64(numbers: Any, value: Tensor) -> Tensor:
    """Return numbers on the host, or where they are on the value's device, without waiting."""
    tensor = torch.as_tensor(numbers, dtype=torch.int64)
    return tensor if tensor.device == value.device else tensor.cpu()
