"""Bilinear sampling of multi-scale tokens, which both attentions share."""

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
