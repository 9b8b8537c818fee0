"""A detector as a function of tensors alone, from which every export is made."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modeling.backbone.padding import divisibility
from ..modeling.detector import Detector
from ..modeling.postprocessing import best_detections, corners
from ..modeling.scales import sizes_to_tensor


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
        dtypes = {parameter.dtype for parameter in detector.parameters()} - {torch.float32}
        if dtypes:
            found = ", ".join(sorted(str(dtype) for dtype in dtypes))
            raise TypeError(f"detectors are exported in torch.float32, got weights in {found}")
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
        mask = level_mask(image_sizes, size, size)
        maps = detector.neck(detector.backbone(images.masked_fill(mask[:, None], 0.0)))
        masks = [level_mask(image_sizes, size, feature_map.shape[2:]) for feature_map in maps]
        pos, scales = detector.locate_masked(masks, padded=True, dtype=maps[0].dtype)
        memory = detector.encode_tokens(maps, pos, scales)
        boxes, scores, classes = best_detections(
            detector.predict(memory, scales), image_sizes, detector.detections_per_image
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
            return F.pad(images, (0, -width % unit, 0, -height % unit))
        return images


def level_mask(image_sizes: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Return the padding mask of a map: the mask of the images resized to the nearest pixel.

    Args:
        image_sizes: ``[B, 2]``, height and width of each image without padding.
        size: height and width of the batch, with padding.
        shape: height and width of the map.

    Returns:
        ``[B, *shape]`` bool, True on padding.
    """
    # In float32, as resize_mask computes it. Sizes become tensors, as ONNX cannot multiply them.
    pixels, cells = sizes_to_tensor([size, shape]).to(image_sizes.device, torch.float32)
    height, width = shape
    steps = pixels / cells
    rows = (torch.arange(height, device=image_sizes.device) * steps[0]).floor()
    columns = (torch.arange(width, device=image_sizes.device) * steps[1]).floor()
    below, right = rows >= image_sizes[:, :1], columns >= image_sizes[:, 1:]
    return below[:, :, None] | right[:, None, :]
