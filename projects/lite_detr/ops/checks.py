"""Argument checks of the sampling operators, in words that the compiled ones share."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_msda(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor | None = None,
) -> None:
    """Check all that is known of deformable attention's arguments without reading any numbers.

    Args:
        grad_output: the gradient of the output, for the backward pass.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    check_sampling(value, spatial_shapes, level_start_index, sampling_locations)
    shape = sampling_locations.shape[:-1]
    check_like("attention_weights", attention_weights, shape, "[B, Q, M, L, P]", value)
    if grad_output is not None:
        check_output("grad_output", grad_output, value, sampling_locations)


def check_key_aware(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
) -> None:
    """Check the arguments of key-aware attention, as :func:`check_msda` does.

    Args:
        key: None if the values are the keys.
    """
    check_sampling(value, spatial_shapes, level_start_index, sampling_locations)
    check_query_and_key(query, key, value, sampling_locations)


def check_fused_msda(
    value: Tensor,
    sizes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> None:
    """Check the arguments of the fused deformable attention, as :func:`check_msda` does.

    Args:
        sizes: heights and widths of the levels, in turn.
    """
    check_offsets(value, sizes, reference_points, sampling_offsets)
    shape = sampling_offsets.shape[:-1]
    check_like("attention_logits", attention_logits, shape, "[B, Q, M, L, P]", value)


def check_fused_key_aware(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    sizes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
) -> None:
    """Check the arguments of the fused key-aware attention, as :func:`check_fused_msda` does.

    Args:
        key: None if the values are the keys.
    """
    check_offsets(value, sizes, reference_points, sampling_offsets)
    check_query_and_key(query, key, value, sampling_offsets)


def check_saved(
    grad_output: Tensor,
    value: Tensor,
    points: Tensor,
    output: Tensor,
    logsumexp: Tensor,
) -> None:
    """Check what the backward pass of key-aware attention takes beside these arguments.

    Args:
        points: the sampling locations or offsets.
    """
    check_output("grad_output", grad_output, value, points)
    check_output("output", output, value, points)
    shape = points.shape[:3]
    if logsumexp.shape != shape:
        raise ValueError(
            f"logsumexp must be [B, Q, M] = {tuple(shape)}, got {tuple(logsumexp.shape)}"
        )
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    if logsumexp.dtype != exact:
        raise TypeError(f"logsumexp must be {exact}, got {logsumexp.dtype}")
    check_device("logsumexp", logsumexp, value)


def check_sampling(
    value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_locations: Tensor
) -> None:
    """Check what both attentions sample: values at locations on levels."""
    check_value("value", value)
    check_levels(spatial_shapes, level_start_index, value)
    check_locations(sampling_locations, value, spatial_shapes.shape[0])


def check_offsets(
    value: Tensor, sizes: Sequence[int], reference_points: Tensor, sampling_offsets: Tensor
) -> None:
    """Check what the fused attentions sample: values at offsets from references on levels."""
    check_value("value", value)
    if len(sizes) == 0 or len(sizes) % 2:
        raise ValueError(
            f"sizes must be the height and width of one level or more, got {list(sizes)}"
        )
    levels = len(sizes) // 2
    check_points("sampling_offsets", sampling_offsets, value, levels)
    check_like(
        "sampling_offsets", sampling_offsets, sampling_offsets.shape, "[B, Q, M, L, P, 2]", value
    )
    shape = tuple(reference_points.shape)
    expected = (*sampling_offsets.shape[:2], levels)
    if len(shape) != 4 or shape[:3] != expected or shape[3] not in (2, 4):
        raise ValueError(
            "reference_points must be [B, Q, L, 2] points or [B, Q, L, 4] boxes with "
            f"B = {expected[0]}, Q = {expected[1]}, L = {levels}, got {shape}"
        )
    check_exact("reference_points", reference_points, value)


def check_query_and_key(query: Tensor, key: Tensor | None, value: Tensor, points: Tensor) -> None:
    if key is not None:
        check_like("key", key, value.shape, "[B, S, M, D]", value)
    batch, _, heads, channels = value.shape
    check_like("query", query, (batch, points.shape[1], heads, channels), "[B, Q, M, D]", value)


def check_value(name: str, value: Tensor) -> None:
    if value.dim() != 4 or value.shape[3] == 0:
        raise ValueError(f"{name} must be [B, S, M, D] with D >= 1, got shape {tuple(value.shape)}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be one of {FLOAT_DTYPES}, got {value.dtype}")


def check_levels(spatial_shapes: Tensor, level_start_index: Tensor, value: Tensor) -> None:
    """Check the tensors that describe the levels, but not the numbers in them."""
    if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2 or spatial_shapes.shape[0] == 0:
        raise ValueError(
            f"spatial_shapes must be [L, 2] with L >= 1, got {tuple(spatial_shapes.shape)}"
        )
    if tuple(level_start_index.shape) != (spatial_shapes.shape[0],):
        raise ValueError(
            f"level_start_index must be [L] = ({spatial_shapes.shape[0]},), "
            f"got {tuple(level_start_index.shape)}"
        )
    levels = {"spatial_shapes": spatial_shapes, "level_start_index": level_start_index}
    for name, tensor in levels.items():
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be torch.int64, got {tensor.dtype}")
        if tensor.device.type != "cpu" and tensor.device != value.device:
            raise ValueError(
                "spatial_shapes and level_start_index must be on the CPU or on the value's device "
                f"{value.device}, got {tensor.device}"
            )


def check_locations(sampling_locations: Tensor, value: Tensor, num_levels: int) -> None:
    """Check that ``sampling_locations`` is ``[B, Q, M, L, P, 2]`` and fits ``value``."""
    check_points("sampling_locations", sampling_locations, value, num_levels)
    check_exact("sampling_locations", sampling_locations, value)


def check_points(name: str, points: Tensor, value: Tensor, num_levels: int) -> None:
    """Check the shape of locations or offsets, ``[B, Q, M, L, P, 2]``."""
    shape = tuple(points.shape)
    batch, _, heads, _ = value.shape
    if len(shape) != 6 or shape[0] != batch or shape[2:4] != (heads, num_levels) or shape[5] != 2:
        raise ValueError(
            f"{name} must be [B, Q, M, L, P, 2] with "
            f"B = {batch}, M = {heads}, L = {num_levels}, got {shape}"
        )
    if shape[4] == 0:
        raise ValueError(f"{name} must hold at least one point a level, got {shape}")


def check_exact(name: str, tensor: Tensor, value: Tensor) -> None:
    """Check the dtype and device of locations or reference points.

    float32 goes with every dtype of ``value``: the 8 bits of a bfloat16 mantissa could not even
    number the columns of a wide feature map.
    """
    if tensor.dtype not in (value.dtype, torch.float32):
        raise TypeError(
            f"{name} must be {value.dtype} (as the value) or torch.float32, got {tensor.dtype}"
        )
    check_device(name, tensor, value)


def check_output(name: str, tensor: Tensor, value: Tensor, points: Tensor) -> None:
    batch, _, heads, channels = value.shape
    shape = (batch, points.shape[1], heads * channels)
    check_like(name, tensor, shape, "[B, Q, M * D]", value)


def check_like(
    name: str, tensor: Tensor, shape: tuple[int, ...], layout: str, like: Tensor
) -> None:
    """Check that ``tensor`` has the given ``shape``, and the dtype and device of ``like``."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be {layout} = {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must have the value's dtype {like.dtype}, got {tensor.dtype}")
    check_device(name, tensor, like)


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the value's device {like.device}, got {tensor.device}")


def level_sizes(
    spatial_shapes: Tensor, level_start_index: Tensor, num_tokens: int
) -> list[tuple[int, int]]:
    """Return the ``(height, width)`` of each level as ints, if the levels tile ``num_tokens``.

    Args:
        spatial_shapes: ``[L, 2]`` int64, ``(H_l, W_l)``; on the host this costs no synchronisation.
        level_start_index: ``[L]`` int64, the token at which each level starts.
        num_tokens: ``S``, the number of tokens of the value.

    Raises:
        ValueError: they do not, or the tensors are on the meta device and hold no numbers.
    """
    for tensor in (spatial_shapes, level_start_index):
        if tensor.device.type == "meta":
            raise ValueError(
                "spatial_shapes and level_start_index must hold numbers, which tensors on the meta "
                "device do not: give them on the CPU"
            )
    sizes = [(height, width) for height, width in spatial_shapes.tolist()]
    check_level_sizes(sizes, num_tokens, level_start_index.tolist())
    return sizes


def check_level_sizes(
    sizes: list[tuple[int, int]], num_tokens: int, given_starts: list[int] | None = None
) -> None:
    """Check that levels of these ``(height, width)`` tile the tokens of a value."""
    if any(height <= 0 or width <= 0 for height, width in sizes):
        raise ValueError(f"every level needs a positive height and width, got {sizes}")
    starts, end = [], 0
    for height, width in sizes:
        starts.append(end)
        end += height * width
    if given_starts is not None and given_starts != starts:
        raise ValueError(
            f"level_start_index must be {starts} for the levels {sizes}, got {given_starts}"
        )
    if end != num_tokens:
        raise ValueError(
            f"the levels {sizes} have {end} tokens in all, but the value has S = {num_tokens}"
        )
