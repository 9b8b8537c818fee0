"""Ground truth in the form that matching and losses take."""

from typing import NamedTuple

import torch
from detectron2.structures import Instances
from torch import Tensor
from torchvision.ops import box_convert


class Target(NamedTuple):
    """The objects of one image.

    Attributes:
        labels: ``[N]`` int64, contiguous class indices.
        boxes: ``[N, 4]``, normalised (cx, cy, w, h).
    """

    labels: Tensor
    boxes: Tensor

    @classmethod
    def from_instances(cls, instances: Instances, dtype: torch.dtype) -> "Target":
        """From Detectron2's ``gt_classes`` and ``gt_boxes`` (absolute x0, y0, x1, y1)."""
        height, width = instances.image_size
        boxes = instances.gt_boxes.tensor.to(dtype)
        boxes = boxes / boxes.new_tensor([width, height, width, height])
        return cls(instances.gt_classes, box_convert(boxes, "xyxy", "cxcywh"))


def class_agnostic(targets: list[Target]) -> list[Target]:
    """The same objects, all of the first class: what proposals that only tell objects from
    background are trained on."""
    return [target._replace(labels=target.labels * 0) for target in targets]
