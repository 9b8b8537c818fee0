"""Generalised IoU of boxes, for the matcher and the losses."""

import torch
from torch import Tensor
from torchvision.ops import box_convert


def generalized_iou(boxes: Tensor, others: Tensor, eps: float = 0.0) -> Tensor:
    """Generalised IoU (arXiv 1902.09630, algorithm 1).

    Args:
        boxes: ``[..., 4]`` as (cx, cy, w, h).
        others: ``[..., 4]``, broadcast against ``boxes``: ``[N, 4]`` and ``[N, 4]`` are pairs,
            ``[Q, 1, 4]`` and ``[N, 4]`` make a matrix.
        eps: added to both denominators, the union and the enclosing area. Deformable DETR and
            H-DETR have 0, DINO has 1e-6.

    Returns:
        ``[...]``, from -1 to 1.
    """
    low, high = box_convert(boxes, "cxcywh", "xyxy").split(2, dim=-1)
    other_low, other_high = box_convert(others, "cxcywh", "xyxy").split(2, dim=-1)
    overlap = _area((torch.min(high, other_high) - torch.max(low, other_low)).clamp(min=0))
    enclosing = _area(torch.max(high, other_high) - torch.min(low, other_low))
    union = _area(high - low) + _area(other_high - other_low) - overlap
    return overlap / (union + eps) - (enclosing - union) / (enclosing + eps)


def _area(size: Tensor) -> Tensor:
    width, height = size.unbind(-1)
    return width * height
