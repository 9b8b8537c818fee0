"""From a batch's predictions to its detections, without a wait for each image."""

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
    """Ranks all (query, class) pairs by score, as Deformable DETR does.

    Nothing here depends on the values of tensors, so that it can be exported.

    Args:
        predictions: of the decoder's last layer.
        image_sizes: ``[B, 2]``, heights and widths in pixels to give the boxes in.
        detections_per_image: ``K``; at most the number of pairs.
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
    """The detections that Detectron2's ``detector_postprocess`` leaves, for a whole batch.

    A GPU is waited for once, for the number of detections of all images.

    Args:
        predictions: of the decoder's last layer.
        image_sizes: of the images that the detector saw, without padding, in pixels.
        output_sizes: what to give the boxes in; they are clipped to it, and empty ones dropped.
        score_thresh: only detections with a higher score are kept.
        detections_per_image: at most so many are kept.

    Returns:
        For each image ``pred_boxes``, ``scores`` and ``pred_classes``, best first.

    Raises:
        FloatingPointError: a box with a score above the threshold is NaN or infinite.
    """
    rows = [
        (height, width, out_height, out_width, out_height / height, out_width / width)
        for (height, width), (out_height, out_width) in zip(image_sizes, output_sizes)
    ]
    # A copy to a GPU that is not said to be non-blocking waits for all that runs there.
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
    # Those that are kept come first, in the same order, so that a number is all it takes to cut
    # the others off.
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
                "such values in the image and in the weights; float16 overflows at 65504, which "
                "bfloat16 does not"
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
    """``torch.tensor``, also for the tensors that sizes are while Detectron2 traces a model."""
    if not torch.jit.is_tracing():
        return torch.tensor(numbers)
    if isinstance(numbers, Sequence):
        return torch.stack([as_tensor(number) for number in numbers])
    return torch.as_tensor(numbers)


def corners(sizes: Tensor) -> Tensor:
    """``[B, 2]`` as (height, width) -> ``[B, 1, 4]`` as (x, y, x, y), which scales boxes."""
    return sizes.flip(1).repeat(1, 2)[:, None]
