"""Key-aware multi-scale deformable attention (Lite DETR, arXiv 2303.07335, section 3.4)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import native
from .checks import check_fused_key_aware, check_key_aware, check_value, level_sizes
from .sampling import flatten, locate_on_levels, sample_levels, sampling_dtype


def key_aware_ms_deform_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
) -> Tensor:
    """Let each query attend to the keys and values that are sampled at its own locations.

    The weights are ``softmax(q . k / sqrt(D))`` over the ``L * P`` sampled keys of a head; keys are
    sampled bilinearly, as values are. A location outside the map samples a zero key and a zero
    value: its logit is 0, and it takes part in the softmax.

    Args:
        query: ``[B, Q, M, D]``, already projected.
        key: ``[B, S, M, D]``; may be the same tensor object as ``value``.
        value: ``[B, S, M, D]``
        spatial_shapes: ``[L, 2]`` int64, ``(H_l, W_l)`` of each level, ``S = sum(H_l * W_l)``.
        level_start_index: ``[L]`` int64, the token at which each level starts.
        sampling_locations: ``[B, Q, M, L, P, 2]``, ``(x, y)`` in ``[0, 1]`` across each level.
            The value's dtype or float32.

    Returns:
        ``[B, Q, M * D]`` in the value's dtype.

    Raises:
        ValueError: a shape, device or level size does not fit.
        TypeError: a dtype does not fit.
    """
    if native.runs_on(value.device):
        # If key and value are one tensor, it is read once.
        query, key, value = native.autocast(
            value.device, query, None if key is value else key, value
        )
        sampling_locations = native.autocast_locations(value.device, sampling_locations)
        if native.has_kernels(value, "key_aware", shared=key is None):
            output, _ = torch.ops.lite_detr.key_aware_ms_deform_attn(
                query, key, value, spatial_shapes, level_start_index, sampling_locations
            )
            return output
        key = value if key is None else key
    return key_aware_ms_deform_attn_pytorch(
        query, key, value, spatial_shapes, level_start_index, sampling_locations
    )


def key_aware_ms_deform_attn_pytorch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
) -> Tensor:
    """Compute :func:`key_aware_ms_deform_attn` by ``grid_sample``, with second derivatives."""
    check_key_aware(query, key, value, spatial_shapes, level_start_index, sampling_locations)
    sizes = level_sizes(spatial_shapes, level_start_index, value.shape[1])
    dtype = sampling_dtype(value.dtype)
    locations = sampling_locations.to(dtype)
    sampled_value = sample_levels(value.to(dtype), sizes, locations)  # [B, M, D, Q, L * P]
    sampled_key = sampled_value if key is value else sample_levels(key.to(dtype), sizes, locations)
    weights = attention_weights(query.to(dtype), sampled_key)  # [B, M, Q, L * P]
    output = (sampled_value * weights.unsqueeze(2)).sum(-1)  # [B, M, D, Q]
    return output.permute(0, 3, 1, 2).flatten(2).to(value.dtype)


def fused_key_aware_ms_deform_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
) -> Tensor:
    """Compute :func:`key_aware_ms_deform_attn` from what a layer regresses, in one pass.

    Args:
        query: ``[B, Q, M, D]``, already projected.
        key: ``[B, S, M, D]``; may be the same tensor object as ``value``.
        value: ``[B, S, M, D]``
        sizes, reference_points, sampling_offsets: see :func:`fused_ms_deform_attn`.

    Returns:
        ``[B, Q, M * D]`` in the value's dtype.

    Raises:
        ValueError: a shape, device or level size does not fit.
        TypeError: a dtype does not fit.
    """
    # torch.jit.trace would record the sizes as constants.
    if native.runs_on(value.device) and not torch.jit.is_tracing():
        query, key, value, sampling_offsets = native.autocast(
            value.device, query, None if key is value else key, value, sampling_offsets
        )
        reference_points = native.autocast_locations(value.device, reference_points)
        if native.has_kernels(value, "key_aware", fused=True, shared=key is None):
            output, _ = torch.ops.lite_detr.fused_key_aware_ms_deform_attn(
                query, key, value, flatten(sizes), reference_points, sampling_offsets
            )
            return output
        key = value if key is None else key
    return _in_steps(
        key_aware_ms_deform_attn, query, key, value, sizes, reference_points, sampling_offsets
    )


def fused_key_aware_ms_deform_attn_pytorch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
) -> Tensor:
    """Compute :func:`fused_key_aware_ms_deform_attn` with second derivatives."""
    return _in_steps(
        key_aware_ms_deform_attn_pytorch,
        query,
        key,
        value,
        sizes,
        reference_points,
        sampling_offsets,
    )


def _in_steps(
    operator: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
) -> Tensor:
    check_fused_key_aware(query, key, value, flatten(sizes), reference_points, sampling_offsets)
    places = locate_on_levels(sizes, reference_points, sampling_offsets)
    return operator(query, key, value, *places)


def key_aware_weights(
    query: Tensor,
    key: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
) -> Tensor:
    """Return the weights that :func:`key_aware_ms_deform_attn` gives its samples.

    Always computed in PyTorch, to look into a model. Takes the memory of all sampled keys,
    ``B * Q * M * L * P * D`` numbers.

    Returns:
        ``[B, Q, M, L, P]``, float64 for float64 keys and float32 for others.
    """
    check_value("key", key)
    check_key_aware(query, None, key, spatial_shapes, level_start_index, sampling_locations)
    sizes = level_sizes(spatial_shapes, level_start_index, key.shape[1])
    dtype = sampling_dtype(key.dtype)
    sampled_key = sample_levels(key.to(dtype), sizes, sampling_locations.to(dtype))
    weights = attention_weights(query.to(dtype), sampled_key).transpose(1, 2)
    return weights.unflatten(-1, (len(sizes), -1))


def attention_weights(query: Tensor, sampled_key: Tensor) -> Tensor:
    """Queries ``[B, Q, M, D]``, keys ``[B, M, D, Q, L * P]`` -> softmax ``[B, M, Q, L * P]``."""
    scaled_query = (query * query.shape[-1] ** -0.5).permute(0, 2, 3, 1).unsqueeze(-1)
    return (scaled_query * sampled_key).sum(2).softmax(-1)
