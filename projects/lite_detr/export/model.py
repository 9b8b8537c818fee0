"""A detector as a function of tensors alone, which is what every export is made of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modeling.backbone.padding import divisibility
from ..modeling.detector import Detector
from ..modeling.postprocessing import best_detections, corners
from ..modeling.scales import sizes_to_tensor


class ExportableDetector(nn.Module):
    """A detector in evaluation mode, from a batch of images to its detections.

    Nothing in it depends on the values of tensors, and sizes only as shapes do, so that batch,
    height and width can be left open in an export. What a backbone asks for beyond the padding of
    the batch is padded within.

    Args:
        detector: in float32; evaluation mode is switched on.

    Raises:
        TypeError: the weights are of another type.
    """

    def __init__(self, detector: Detector):
        super().__init__()
        dtypes = {parameter.dtype for parameter in detector.parameters()} - {torch.float32}
        if dtypes:
            found = ", ".join(sorted(str(dtype) for dtype in dtypes))
            raise TypeError(f"a detector is exported in torch.float32, got weights in {found}")
        self.detector = detector.eval()

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            images: ``[B, 3, H, W]`` float32 in 0 to 255, padded at the bottom and right with
                whatever values.
            image_sizes: ``[B, 2]`` int64, height and width of each image without padding.

        Returns:
            boxes ``[B, K, 4]`` as (x1, y1, x2, y2) in pixels of the images, clipped to them, scores
            ``[B, K]`` and classes ``[B, K]`` int64, best first. ``K`` is the detector's
            ``detections_per_image``: low scores and empty boxes are among them.
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
        """Zeros at the bottom and right, up to what the backbone asks for."""
        height, width = images.shape[2:]
        square = self.detector.backbone.padding_constraints.get("square_size", 0)
        unit = divisibility(self.detector.backbone)
        if square:
            return F.pad(images, (0, square - width, 0, square - height))
        if unit > 1:
            return F.pad(images, (0, -width % unit, 0, -height % unit))
        return images


def level_mask(image_sizes: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """The padding of a map: what resizing that of the images to the nearest pixel gives.

    Args:
        image_sizes: ``[B, 2]``, height and width of each image without padding.
        size: height and width with it.
        shape: height and width of the map.

    Returns:
        ``[B, *shape]`` bool, True on padding.
    """
    # As resize_mask computes it, in float32; with tensors, as ONNX knows no products with sizes.
    pixels, cells = sizes_to_tensor([size, shape]).to(image_sizes.device, torch.float32)
    height, width = shape
    steps = pixels / cells
    rows = (torch.arange(height, device=image_sizes.device) * steps[0]).floor()
    columns = (torch.arange(width, device=image_sizes.device) * steps[1]).floor()
    below, right = rows >= image_sizes[:, :1], columns >= image_sizes[:, 1:]
    return below[:, :, None] | right[:, None, :]
