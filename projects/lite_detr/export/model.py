"""A detector as a function of tensors alone, from which every export is made."""

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..modeling.detector import Detector
from ..modeling.inputs import divisibility
from ..modeling.postprocessing import best_detections, corners
from ..modeling.scales import mask_from_sizes


class ExportableDetector(nn.Module):
    """A detector in evaluation mode, from a batch of images to its detections.

    Nothing here depends on the values of tensors, and sizes enter only as shapes, so an export can
    leave batch, height and width open. Padding that the backbone needs beyond that of the batch is
    added inside.

    Args:
        detector: in float32; it is switched to evaluation mode.

    Raises:
        TypeError: the weights are not in float32.
    """

    def __init__(self, detector: Detector):
        super().__init__()
        check_dtype(detector)
        self.detector = detector.eval()

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            images: ``[B, 3, H, W]`` float32 in 0 to 255, padded at the bottom and right with any
                values.
            image_sizes: ``[B, 2]`` int64, height and width of each image without padding.

        Returns:
            boxes ``[B, K, 4]`` as (x1, y1, x2, y2) in pixels of the images, clipped to them, scores
            ``[B, K]`` and classes ``[B, K]`` int64, best first. ``K`` is the detector's
            ``detections_per_image``; low scores and empty boxes are included.
        """
        detector = self.detector
        images = self.pad(detector.normalize(images))
        size = images.shape[2:]
        mask = mask_from_sizes(image_sizes, size, size)
        memory, scales = detector.encode(
            ImageList(images.masked_fill(mask[:, None], 0.0), image_sizes)
        )
        predictions = detector.independent_classes(detector.predict(memory, scales))
        boxes, scores, classes = best_detections(
            predictions, image_sizes, detector.detections_per_image
        )
        limits = corners(image_sizes.to(boxes.dtype))
        return boxes.clamp(min=0).minimum(limits), scores, classes

    def pad(self, images: Tensor) -> Tensor:
        """Pad with zeros at the bottom and right, to a size that the backbone accepts."""
        height, width = images.shape[2:]
        square = self.detector.backbone.padding_constraints.get("square_size", 0)
        unit = divisibility(self.detector.backbone)
        if square:
            return F.pad(images, (0, square - width, 0, square - height))
        if unit > 1:
            # Without remainders, which shape inference of ONNX lacks.
            below, right = ((side + unit - 1) // unit * unit - side for side in (height, width))
            return F.pad(images, (0, right, 0, below))
        return images


def check_dtype(detector: Detector) -> None:
    """Check that a detector is in float32.

    In 16 bits, a CPU computes narrow images in another way, which a trace of a wide one lacks.

    Raises:
        TypeError: weights are in another type.
    """
    dtypes = {parameter.dtype for parameter in detector.parameters()} - {torch.float32}
    if dtypes:
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise TypeError(f"detectors are exported in torch.float32, got weights in {found}")
