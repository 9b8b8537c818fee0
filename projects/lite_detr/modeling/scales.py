"""The geometry of the feature scales, as one immutable value that every layer gets."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.sampling import level_tensors, sizes_to_tensor


@dataclass(frozen=True, eq=False)
class Levels:
    """The sizes and the padding of multi-scale tokens, which is all that an attention needs.

    Tokens are ordered by scale, high resolution first, and row by row within a scale.

    Attributes:
        shapes: ``(height, width)`` of each of the ``L`` scales.
        padding_mask: ``[B, S]`` bool, True on padding; None if no image of the batch is padded.
        cell_sizes: ``[L, 2]``, the ``(x, y)`` extent of a cell in the padded frame of each scale.
        spatial_shapes: ``[L, 2]`` int64 on the host, ``shapes`` as the operators take them.
        level_start_index: ``[L]`` int64 on the host, the first token of each scale.
    """

    shapes: tuple[tuple[int, int], ...]
    padding_mask: Tensor | None
    cell_sizes: Tensor
    spatial_shapes: Tensor
    level_start_index: Tensor

    @property
    def num_levels(self) -> int:
        return len(self.shapes)

    @property
    def num_tokens(self) -> int:
        """``S``, the number of tokens of all scales."""
        return sum(height * width for height, width in self.shapes)

    def start(self, level: int) -> int:
        """Return the index of a scale's first token; ``start(0)`` is 0."""
        return sum(height * width for height, width in self.shapes[:level])


@dataclass(frozen=True, eq=False)
class Scales(Levels):
    """The geometry of the multi-scale tokens of a batch, made once per forward pass.

    Attributes:
        valid_ratios: ``[B, L, 2]``, the ``(x, y)`` share of each map that an image covers.
        centers: ``[B, S, 2]``, the ``(x, y)`` centre of each token in its image's ``[0, 1]`` frame
            (beyond 1 on padding).
        reference_points: ``[B, S, L, 2]``, the same centres in the padded frame of every scale,
            around which the encoder's queries sample.
    """

    valid_ratios: Tensor
    centers: Tensor
    reference_points: Tensor

    @classmethod
    def from_masks(cls, masks: list[Tensor], padded: bool, dtype: torch.dtype) -> "Scales":
        """Derive everything from the padding masks of the scales.

        The geometry is computed in float32 whatever ``dtype`` is, as in the references.

        Args:
            masks: ``[B, H_l, W_l]`` bool for each scale, True on padding.
            padded: True if any image of the batch is padded (known on the host).
            dtype: of the floating-point attributes.
        """
        shapes = tuple((mask.shape[1], mask.shape[2]) for mask in masks)
        spatial_shapes, level_start_index = level_tensors(shapes)
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
            level_start_index=level_start_index,
        )


def resize_mask(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """``[B, H, W]`` bool -> ``[B, *shape]`` bool, nearest neighbour as in the references."""
    return F.interpolate(mask[:, None].float(), size=shape)[:, 0].bool()


def mask_from_sizes(image_sizes: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Compute the padding of a map from sizes that are a tensor, with :func:`resize_mask`'s result.

    Args:
        image_sizes: ``[B, 2]``, height and width of each image without padding.
        size: height and width with padding.
        shape: height and width of the map.

    Returns:
        ``[B, *shape]`` bool, True on padding.
    """
    # In float32, as resize_mask computes it, and with tensors: ONNX has no products with sizes.
    pixels, cells = sizes_to_tensor([size, shape]).to(image_sizes.device, torch.float32)
    height, width = shape
    steps = pixels / cells
    rows = (torch.arange(height, device=image_sizes.device) * steps[0]).floor()
    columns = (torch.arange(width, device=image_sizes.device) * steps[1]).floor()
    below, right = rows >= image_sizes[:, :1], columns >= image_sizes[:, 1:]
    return below[:, :, None] | right[:, None, :]


def _valid_cells(mask: Tensor) -> Tensor:
    """``[B, H, W]`` -> ``[B, 2]``: the ``(x, y)`` extent of the part without padding, in cells."""
    return torch.stack([(~mask[:, 0, :]).sum(1), (~mask[:, :, 0]).sum(1)], dim=-1).float()


def _centers(shape: tuple[int, int], valid: Tensor) -> Tensor:
    """Return cell centres ``[B, H * W, 2]`` of one scale, relative to its part ``valid [B, 2]``."""
    height, width = shape
    y, x = torch.meshgrid(
        torch.arange(height, device=valid.device) + 0.5,
        torch.arange(width, device=valid.device) + 0.5,
        indexing="ij",
    )
    return torch.stack([x.flatten() / valid[:, :1], y.flatten() / valid[:, 1:]], dim=-1)
