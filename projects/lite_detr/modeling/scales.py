"""What every layer needs to know about the feature scales, as one immutable value."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.layers import shapes_to_tensor
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scales:
    """The geometry of the multi-scale tokens of a batch, made once per forward pass.

    Tokens are ordered by scale, high resolution first, and row by row within a scale.

    Attributes:
        shapes: ``(height, width)`` of each of the ``L`` scales.
        padding_mask: ``[B, S]`` bool, True on padding; None where no image of the batch is padded.
        valid_ratios: ``[B, L, 2]``, the ``(x, y)`` share of each map that an image covers.
        centers: ``[B, S, 2]``, the ``(x, y)`` centre of each token in its image's ``[0, 1]`` frame
            (beyond 1 on padding).
        reference_points: ``[B, S, L, 2]``, the same centres in the padded frame of every scale:
            where the encoder's queries look.
        cell_sizes: ``[L, 2]``, the ``(x, y)`` extent of a cell in the padded frame of each scale.
        spatial_shapes: ``[L, 2]`` int64 on the host, ``shapes`` as the operators take them.
        level_start_index: ``[L]`` int64 on the host, the first token of each scale.
    """

    shapes: tuple[tuple[int, int], ...]
    padding_mask: Tensor | None
    valid_ratios: Tensor
    centers: Tensor
    reference_points: Tensor
    cell_sizes: Tensor
    spatial_shapes: Tensor
    level_start_index: Tensor

    @classmethod
    def from_masks(cls, masks: list[Tensor], padded: bool, dtype: torch.dtype) -> "Scales":
        """Derives everything from the padding masks of the scales.

        The geometry is computed in float32 whatever ``dtype`` is, as the references do it.

        Args:
            masks: ``[B, H_l, W_l]`` bool for each scale, True on padding.
            padded: whether any image of the batch is padded (known on the host).
            dtype: of the floating-point attributes.
        """
        shapes = tuple((mask.shape[1], mask.shape[2]) for mask in masks)
        spatial_shapes = sizes_to_tensor(shapes)
        sizes = spatial_shapes.prod(1)
        extents = spatial_shapes.flip(1).to(masks[0].device)
        valid_ratios = torch.stack([_valid_cells(mask) for mask in masks], dim=1) / extents
        centers = torch.cat(
            [
                _centers(shape, valid_ratios[:, level] * extents[level])
                for level, shape in enumerate(shapes)
            ],
            dim=1,
        )
        return cls(
            shapes=shapes,
            padding_mask=torch.cat([mask.flatten(1) for mask in masks], dim=1) if padded else None,
            valid_ratios=valid_ratios.to(dtype),
            centers=centers.to(dtype),
            reference_points=(centers[:, :, None] * valid_ratios[:, None]).to(dtype),
            cell_sizes=1.0 / extents.to(dtype),
            spatial_shapes=spatial_shapes,
            level_start_index=sizes.cumsum(0) - sizes,
        )

    @property
    def num_levels(self) -> int:
        return len(self.shapes)

    @property
    def num_tokens(self) -> int:
        """``S``, the tokens of all scales."""
        return sum(height * width for height, width in self.shapes)

    def start(self, level: int) -> int:
        """The first token of a scale; ``start(0)`` is 0."""
        return sum(height * width for height, width in self.shapes[:level])


def sizes_to_tensor(sizes: Sequence[tuple[int, int]]) -> Tensor:
    """``(height, width)`` for each -> ``[N, 2]`` int64 on the host.

    ``torch.jit.trace`` makes tensors of sizes: what is stacked here stays a function of the images.
    """
    if torch.jit.is_tracing():
        return torch.stack([shapes_to_tensor(size) for size in sizes])
    return torch.tensor(sizes, dtype=torch.int64)


def resize_mask(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """``[B, H, W]`` bool -> ``[B, *shape]`` bool, nearest neighbour as in the references."""
    return F.interpolate(mask[:, None].float(), size=shape)[:, 0].bool()


def _valid_cells(mask: Tensor) -> Tensor:
    """``[B, H, W]`` -> ``[B, 2]``: the ``(x, y)`` extent in cells of what is no padding."""
    return torch.stack([(~mask[:, 0, :]).sum(1), (~mask[:, :, 0]).sum(1)], dim=-1).float()


def _centers(shape: tuple[int, int], valid: Tensor) -> Tensor:
    """Cell centres ``[B, H * W, 2]`` of one scale, relative to its part ``valid [B, 2]``."""
    height, width = shape
    y, x = torch.meshgrid(
        torch.arange(height, device=valid.device) + 0.5,
        torch.arange(width, device=valid.device) + 0.5,
        indexing="ij",
    )
    return torch.stack([x.flatten() / valid[:, :1], y.flatten() / valid[:, 1:]], dim=-1)
