"""Argument checks shared by the sampling operators."""

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_value(name: str, value: Tensor) -> None:
    """Raises unless ``value`` is a floating-point ``[B, S, M, D]`` tensor."""
    if value.dim() != 4:
        raise ValueError(f"{name} must be [B, S, M, D], got shape {tuple(value.shape)}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be one of {FLOAT_DTYPES}, got {value.dtype}")


def check_like(
    name: str, tensor: Tensor, shape: tuple[int, ...], layout: str, like: Tensor
) -> None:
    """Raises unless ``tensor`` has the given ``shape`` and the dtype and device of ``like``."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be {layout} = {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must have the value's dtype {like.dtype}, got {tensor.dtype}")
    check_device(name, tensor, like)


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the value's device {like.device}, got {tensor.device}")


def check_locations(sampling_locations: Tensor, value: Tensor, num_levels: int) -> None:
    """Raises unless ``sampling_locations`` is ``[B, Q, M, L, P, 2]`` and fits ``value``.

    float32 locations go with every dtype of ``value``: the 8 bits of a bfloat16 mantissa could not
    even name the columns of a wide feature map.
    """
    shape = tuple(sampling_locations.shape)
    batch, _, heads, _ = value.shape
    if len(shape) != 6 or shape[0] != batch or shape[2:4] != (heads, num_levels) or shape[5] != 2:
        raise ValueError(
            "sampling_locations must be [B, Q, M, L, P, 2] with "
            f"B = {batch}, M = {heads}, L = {num_levels}, got {shape}"
        )
    if shape[4] == 0:
        raise ValueError(f"sampling_locations must hold at least one point a level, got {shape}")
    if sampling_locations.dtype not in (value.dtype, torch.float32):
        raise TypeError(
            f"sampling_locations must be {value.dtype} (as the value) or torch.float32, "
            f"got {sampling_locations.dtype}"
        )
    check_device("sampling_locations", sampling_locations, value)


def check_plain(
    value: Tensor, sampling_locations: Tensor, attention_weights: Tensor, num_levels: int
) -> None:
    """Raises unless what deformable attention takes beside ``value`` fits it."""
    check_locations(sampling_locations, value, num_levels)
    shape = sampling_locations.shape[:-1]
    check_like("attention_weights", attention_weights, shape, "[B, Q, M, L, P]", value)


def check_key_aware(
    query: Tensor, key: Tensor | None, value: Tensor, sampling_locations: Tensor, num_levels: int
) -> None:
    """Raises unless what key-aware attention takes beside ``value`` fits it."""
    check_locations(sampling_locations, value, num_levels)
    if key is not None:
        check_like("key", key, value.shape, "[B, S, M, D]", value)
    batch, _, heads, channels = value.shape
    query_shape = (batch, sampling_locations.shape[1], heads, channels)
    check_like("query", query, query_shape, "[B, Q, M, D]", value)


def level_sizes(
    spatial_shapes: Tensor, level_start_index: Tensor, num_tokens: int
) -> list[tuple[int, int]]:
    """The ``(height, width)`` of each level as ints, once they are known to tile ``num_tokens``.

    Args:
        spatial_shapes: ``[L, 2]`` int64, ``(H_l, W_l)``; on the host this costs no synchronisation.
        level_start_index: ``[L]`` int64, the token at which each level starts.
        num_tokens: ``S``, the number of tokens of the value.
    """
    if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2 or spatial_shapes.shape[0] == 0:
        raise ValueError(
            f"spatial_shapes must be [L, 2] with L >= 1, got {tuple(spatial_shapes.shape)}"
        )
    if tuple(level_start_index.shape) != (spatial_shapes.shape[0],):
        raise ValueError(
            f"level_start_index must be [L] = ({spatial_shapes.shape[0]},), "
            f"got {tuple(level_start_index.shape)}"
        )
    for name, tensor in (
        ("spatial_shapes", spatial_shapes),
        ("level_start_index", level_start_index),
    ):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be torch.int64, got {tensor.dtype}")
    sizes = [(height, width) for height, width in spatial_shapes.tolist()]
    if any(height <= 0 or width <= 0 for height, width in sizes):
        raise ValueError(f"every level needs a positive height and width, got {sizes}")
    starts, end = [], 0
    for height, width in sizes:
        starts.append(end)
        end += height * width
    if level_start_index.tolist() != starts:
        raise ValueError(
            f"level_start_index must be {starts} for the levels {sizes}, "
            f"got {level_start_index.tolist()}"
        )
    if end != num_tokens:
        raise ValueError(
            f"the levels {sizes} have {end} tokens in all, but the value has S = {num_tokens}"
        )
    return sizes
