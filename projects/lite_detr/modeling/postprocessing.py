"""Turn a batch's predictions into detections, waiting for the GPU only once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import box_convert

from .heads import Predictions

Size = tuple[int, int]  # height, width


class Detections(NamedTuple):
    """The best (query, class) pairs of each image, best first.

    Attributes:
        boxes: ``[B, K, 4]``, absolute (x1, y1, x2, y2) in the image's pixels.
        scores: ``[B, K]``, in 0 to 1.
        classes: ``[B, K]``, int64.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor


def best_detections(
    predictions: Predictions, image_sizes: Tensor, detections_per_image: int
) -> Detections:
    """Rank all (query, class) pairs by score, as Deformable DETR does.

    Nothing here depends on the values of tensors, so this can be exported.

    Args:
        predictions: those of the decoder's last layer.
        image_sizes: ``[B, 2]``, heights and widths in pixels; boxes are scaled to them.
        detections_per_image: ``K``, limited by the number of pairs.
    """
    logits, boxes = predictions
    num_pairs, num_classes = logits.shape[1] * logits.shape[2], logits.shape[2]
    scores, pairs = logits.sigmoid().flatten(1).topk(min(detections_per_image, num_pairs))
    queries = (pairs // num_classes)[..., None].expand(-1, -1, 4)
    boxes = box_convert(boxes.gather(1, queries), "cxcywh", "xyxy")
    return Detections(boxes * corners(image_sizes.to(boxes.dtype)), scores, pairs % num_classes)


def detector_instances(
    predictions: Predictions,
    image_sizes: Sequence[Size],
    output_sizes: Sequence[Size],
    score_thresh: float,
    detections_per_image: int,
) -> list[Instances]:
    """Do for a whole batch what Detectron2's ``detector_postprocess`` does for an image.

    A GPU is waited for once, for the number of detections of all images.

    Args:
        predictions: those of the decoder's last layer.
        image_sizes: sizes of the images that the detector saw, without padding, in pixels.
        output_sizes: sizes that boxes are scaled and clipped to; empty boxes are dropped.
        score_thresh: only detections with a higher score are kept.
        detections_per_image: the largest number of detections kept.

    Returns:
        ``pred_boxes``, ``scores`` and ``pred_classes`` of each image, best first.

    Raises:
        FloatingPointError: a box with a score above the threshold is NaN or infinite.
    """
    rows = [
        (height, width, out_height, out_width, out_height / height, out_width / width)
        for (height, width), (out_height, out_width) in zip(image_sizes, output_sizes)
    ]
    # A blocking copy would wait for everything that runs on the GPU.
    sizes = as_tensor(rows).to(predictions.boxes.device, non_blocking=True)
    seen, wanted, ratios = sizes.split(2, dim=1)
    boxes, scores, classes = best_detections(predictions, seen, detections_per_image)
    # Detectron2's `Boxes` are float32, whatever the model is.
    boxes = boxes.float() * corners(ratios)
    above = scores > score_thresh
    broken = (above & ~boxes.isfinite().all(2)).sum(1)
    boxes = boxes.clamp(min=0).minimum(corners(wanted))
    x1, y1, x2, y2 = boxes.unbind(2)
    kept = above & (x2 > x1) & (y2 > y1)
    # Those kept come first, in the same order, so that their number is enough to cut off the rest.
    order = kept.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    scores, classes = scores.gather(1, order), classes.gather(1, order)

    numbers = torch.stack([kept.sum(1), broken], 1)
    tracing = torch.jit.is_tracing()
    results = []
    for index, (num_kept, num_broken) in enumerate(numbers if tracing else numbers.tolist()):
        if num_broken:
            raise FloatingPointError(
                f"{num_broken} boxes of image {index} in the batch are NaN or infinite: look for "
                "such values in the image and in the weights; float16 overflows at 65504, bfloat16 "
                "does not"
            )
        size = output_sizes[index]
        results.append(
            Instances(
                as_tensor(size) if tracing else size,
                pred_boxes=Boxes(boxes[index, :num_kept]),
                scores=scores[index, :num_kept],
                pred_classes=classes[index, :num_kept],
            )
        )
    return results


def as_tensor(numbers: Sequence) -> Tensor:
    """``torch.tensor``, also for sizes that are tensors while Detectron2 traces a model."""
    if not torch.jit.is_tracing():
        return torch.tensor(numbers)
    if isinstance(numbers, Sequence):
        return torch.stack([as_tensor(number) for number in numbers])
    return torch.as_tensor(numbers)


def corners(sizes: Tensor) -> Tensor:
    """``[B, 2]`` as (height, width) -> ``[B, 1, 4]`` as (x, y, x, y), to scale boxes with."""
    return sizes.flip(1).repeat(1, 2)[:, None]
