"""Bilinear sampling of multi-scale tokens, which both attentions share."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_levels(
    tokens: Tensor, sizes: list[tuple[int, int]], sampling_locations: Tensor
) -> Tensor:
    """Sample every level bilinearly, with zeros outside the map.

    The centre of the top-left cell of an ``H x W`` level is at ``(0.5 / W, 0.5 / H)``, as in
    ``grid_sample(align_corners=False)``.

    Args:
        tokens: ``[B, S, M, D]``, level after level, row by row.
        sizes: ``(height, width)`` of each level.
        sampling_locations: ``[B, Q, M, L, P, 2]``, ``(x, y)`` in ``[0, 1]`` across each level.

    Returns:
        ``[B, M, D, Q, L * P]``
    """
    batch, _, heads, channels = tokens.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    # grid_sample would turn what is not finite into NaN; the operators take it as outside the map.
    grids = torch.nan_to_num(2 * sampling_locations - 1, nan=-3.0, posinf=3.0, neginf=-3.0)
    samples = []
    levels = tokens.split([height * width for height, width in sizes], dim=1)
    for level, ((height, width), level_tokens) in enumerate(zip(sizes, levels)):
        feature_map = level_tokens.permute(0, 2, 3, 1).reshape(
            batch * heads, channels, height, width
        )
        grid = grids[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2)
        samples.append(
            F.grid_sample(
                feature_map, grid, mode="bilinear", padding_mode="zeros", align_corners=False
            )
        )
    return torch.cat(samples, dim=-1).view(batch, heads, channels, queries, len(sizes) * points)


def sampling_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to sample and sum in: float32 for 16-bit values."""
    return dtype if dtype == torch.float64 else torch.float32


def locate_points(reference_points: Tensor, sampling_offsets: Tensor, cell_sizes: Tensor) -> Tensor:
    """Return where queries sample: ``[B, Q, M, L, P, 2]`` in the padded frame of each level.

    The unit of offsets is a cell around a point, and the half extent over ``P`` around a box.

    Args:
        reference_points: ``[B, Q, L, 2]`` points or ``[B, Q, L, 4]`` boxes (cx, cy, w, h).
        sampling_offsets: ``[B, Q, M, L, P, 2]``
        cell_sizes: ``[L, 2]``, the ``(x, y)`` extent of a cell of each level.

    Raises:
        ValueError: the references are neither points nor boxes.
    """
    points = sampling_offsets.shape[4]
    if reference_points.shape[-1] == 2:
        steps = cell_sizes[None, None]
    elif reference_points.shape[-1] == 4:
        steps = reference_points[..., 2:] * (0.5 / points)
    else:
        raise ValueError(
            "reference_points must be [B, Q, L, 2] points or [B, Q, L, 4] boxes, "
            f"got {tuple(reference_points.shape)}"
        )
    # Heads share centres and steps. Repeating them for each point first allows one pass over whole
    # rows, which is several times faster than one over pairs (x, y).
    locations = torch.addcmul(
        _repeat_points(reference_points[..., :2], points),
        sampling_offsets.to(reference_points.dtype).flatten(3),
        _repeat_points(steps, points),
    )
    return locations.view_as(sampling_offsets)


def _repeat_points(pairs: Tensor, points: int) -> Tensor:
    """``[..., L, 2]`` of a query's levels -> ``[..., 1, L * P * 2]`` of its points."""
    repeated = pairs.unsqueeze(-2).expand(*pairs.shape[:-1], points, 2)
    return repeated.flatten(-3).unsqueeze(-2)


def locate_on_levels(
    sizes: Sequence[tuple[int, int]], reference_points: Tensor, sampling_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the operators take of the same points: levels, their starts, and locations.

    Args:
        sizes: ``(height, width)`` of each level.
        reference_points, sampling_offsets: see :func:`locate_points`.

    Returns:
        ``[L, 2]``, ``[L]`` and ``[B, Q, M, L, P, 2]``
    """
    spatial_shapes, level_start_index = level_tensors(sizes)
    cells = cell_sizes(spatial_shapes, reference_points)
    locations = locate_points(reference_points, sampling_offsets, cells)
    return spatial_shapes, level_start_index, locations


def cell_sizes(spatial_shapes: Tensor, reference_points: Tensor) -> Tensor:
    """``[L, 2]`` heights and widths -> ``[L, 2]``, the extent of a cell, like the references."""
    return 1.0 / spatial_shapes.flip(1).to(reference_points.device, reference_points.dtype)


def sizes_to_tensor(sizes: Sequence[tuple[int, int]]) -> Tensor:
    """``(height, width)`` of each -> ``[N, 2]`` int64 on the host.

    ``torch.jit.trace`` turns sizes into tensors; stacked, they stay a function of the images.
    """
    if torch.jit.is_tracing():
        return torch.stack([torch.stack([*map(torch.as_tensor, size)]) for size in sizes])
    return torch.tensor(sizes, dtype=torch.int64)


def flatten(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """``(height, width)`` of each level -> heights and widths in turn."""
    return [number for size in sizes for number in size]


def unflatten(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Heights and widths in turn -> ``(height, width)`` of each level."""
    return list(zip(numbers[::2], numbers[1::2]))


def level_tensors(sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Return the sizes and the starts of levels, ``[L, 2]`` and ``[L]`` int64 on the host."""
    spatial_shapes = sizes_to_tensor(sizes)
    numbers = spatial_shapes.prod(1)
    return spatial_shapes, numbers.cumsum(0) - numbers
