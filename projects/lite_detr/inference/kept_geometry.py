"""Position encodings and reference points, kept for images of the same shape."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from detectron2.structures import ImageList
from torch import Tensor

from ..modeling.scales import Scales

# Of 800x1066 pixels, each image of a batch takes 18 MiB in float32.
MAX_KEPT = 8


class KeptGeometry:
    """``locate_tokens`` of a detector whose weights no longer change: computed once for a shape.

    Args:
        compute: the method, which is called for shapes that are new.
    """

    def __init__(self, compute: Callable[[list[Tensor], ImageList], tuple[Tensor, Scales]]):
        self.compute = compute
        self.kept: OrderedDict[tuple, tuple[Tensor, Scales]] = OrderedDict()

    def __call__(self, maps: list[Tensor], images: ImageList) -> tuple[Tensor, Scales]:
        """See :meth:`Detector.locate_tokens`."""
        if torch.jit.is_tracing():
            # What is kept would be a constant of the trace.
            return self.compute(maps, images)
        key = (
            tuple(map(tuple, images.image_sizes)),
            tuple(images.tensor.shape),
            tuple(tuple(feature_map.shape) for feature_map in maps),
            maps[0].dtype,
            maps[0].device,
        )
        if key in self.kept:
            self.kept.move_to_end(key)
        else:
            self.kept[key] = self.compute(maps, images)
            if len(self.kept) > MAX_KEPT:
                self.kept.popitem(last=False)
        return self.kept[key]
