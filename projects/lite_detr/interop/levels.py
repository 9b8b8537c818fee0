"""Levels as other projects describe them: checked, and in the form that our modules take."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LevelsError
from ..modeling.scales import Levels


def flatten_maps(maps: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Flatten feature maps into tokens.

    Args:
        maps: ``[B, C, H_l, W_l]`` of each level, fine to coarse.

    Returns:
        The tokens ``[B, S, C]``, and ``(H_l, W_l)`` of each level.
    """
    tokens = torch.cat([feature_map.flatten(2).transpose(1, 2) for feature_map in maps], dim=1)
    return tokens, [(feature_map.shape[2], feature_map.shape[3]) for feature_map in maps]


def split_tokens(tokens: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return the feature maps ``[B, C, H_l, W_l]`` of tokens ``[B, S, C]``."""
    levels = tokens.split([height * width for height, width in shapes], dim=1)
    return [
        level.transpose(1, 2).unflatten(2, (height, width))
        for level, (height, width) in zip(levels, shapes)
    ]


def shapes_on_host(shapes: Any) -> tuple[tuple[int, int], ...]:
    """Return ``(height, width)`` of each level from a tensor, an array or a list.

    Raises:
        LevelsError: it is not a pair of numbers for each level.
    """
    try:
        pairs = shapes.tolist() if hasattr(shapes, "tolist") else shapes
        return tuple((int(height), int(width)) for height, width in pairs)
    except (TypeError, ValueError):
        shape = getattr(shapes, "shape", None)
        given = f"shape {tuple(shape)}" if shape is not None else repr(shapes)
        raise LevelsError(
            f"spatial_shapes must be [L, 2], (height, width) of each level, got {given}"
        ) from None


def make_levels(
    shapes: Any, tokens: Tensor, padding_mask: Tensor | None, num_levels: int
) -> Levels:
    """Describe the levels of some tokens for our attentions.

    Args:
        shapes: ``(height, width)`` of each level: a tensor of any integer dtype, an array or a
            list.
        tokens: ``[B, S, C]``, the tokens of all levels.
        padding_mask: ``[B, S]``, true on padding, or None.
        num_levels: the number that the module is built for.

    Raises:
        LevelsError: the levels are of another number, do not add up to the tokens, or the mask does
            not fit these.
    """
    sizes = shapes_on_host(shapes)
    given = ", ".join(f"{height}x{width}" for height, width in sizes)
    if len(sizes) != num_levels:
        raise LevelsError(
            f"the module is built for {num_levels} levels, got {len(sizes)}: {given} "
            "(height x width)"
        )
    total = sum(height * width for height, width in sizes)
    if tokens.dim() != 3 or total != tokens.shape[1]:
        raise LevelsError(
            f"the levels {given} (height x width) have {total} tokens, so the tokens must be "
            f"[B, {total}, C], got {tuple(tokens.shape)}"
        )
    if padding_mask is not None:
        if padding_mask.shape != tokens.shape[:2]:
            raise LevelsError(
                f"the padding mask must be [B, S] = {tuple(tokens.shape[:2])}, true on padding, "
                f"got {tuple(padding_mask.shape)}"
            )
        padding_mask = padding_mask.bool()
    spatial_shapes = torch.tensor(sizes, dtype=torch.int64)
    counts = spatial_shapes.prod(1)
    extents = spatial_shapes.flip(1).to(tokens.device, exact_dtype(tokens.dtype))
    return Levels(
        shapes=sizes,
        padding_mask=padding_mask,
        cell_sizes=1.0 / extents,
        spatial_shapes=spatial_shapes,
        level_start_index=counts.cumsum(0) - counts,
    )


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of locations beside values of a dtype: 16 bits are too few for them."""
    return torch.float64 if dtype == torch.float64 else torch.float32
