"""Stands for ``MultiScaleDeformableAttention``, the compiled extension of Deformable-DETR.

The code of Deformable-DETR, DINO, Mask2Former and Mask DINO imports it unchanged, without nvcc and
on a CPU, after::

    sys.modules["MultiScaleDeformableAttention"] = lite_detr.interop.extension
"""

import torch
from torch import Tensor

from .sampling import MSDeformAttnFunction


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    """Return ``[B, Q, M * D]``, see :class:`~lite_detr.interop.MSDeformAttnFunction`."""
    return MSDeformAttnFunction.apply(
        value, spatial_shapes, level_start_index, sampling_loc, attn_weight, im2col_step
    )


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> tuple[Tensor, ...]:
    """Return the gradients of the value, the locations and the weights."""
    inputs = [tensor.detach().requires_grad_() for tensor in (value, sampling_loc, attn_weight)]
    with torch.enable_grad():
        output = ms_deform_attn_forward(
            inputs[0], spatial_shapes, level_start_index, *inputs[1:], im2col_step
        )
    return torch.autograd.grad(output, inputs, grad_output)
