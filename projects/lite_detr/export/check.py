"""Whether an exported file gives the detections that the detector gives."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..modeling.detector import Detector
from ..modeling.postprocessing import Detections
from .model import ExportableDetector

# The largest difference that rounding may make, in scores and in boxes as a share of the image.
LIMIT = 1e-4

# Images [B, 3, H, W] and their sizes [B, 2] -> the detections of each of them, without a batch.
Run = Callable[[Tensor, Tensor], Iterator[Detections]]


class Differences(NamedTuple):
    """The largest ones between two sets of detections.

    Attributes:
        scores: of detections of the same rank; infinite where their numbers differ.
        boxes: of a detection and the nearest of its class, as a share of the image's longer side.
    """

    scores: float
    boxes: float


def sample_batches(detector: Detector) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of noise and their sizes: one, two of a size, and two with noise for padding too.

    They are about as small as the coarsest map and the number of queries let them be, and no size
    is a multiple of a stride.
    """
    stride = coarsest_stride(detector)
    side, queries = 2 * stride, getattr(detector.queries, "num_queries", 0)
    levels = range(len(detector.level_embed))
    while sum((side * 2**level // stride) ** 2 for level in levels) < queries:
        side += stride
    generator = torch.Generator().manual_seed(0)
    for height, width, sizes in (
        (side + 37, side + 91, [(side + 37, side + 91)]),
        (side + 90, side + 3, [(side + 90, side + 3)] * 2),
        (side + 59, side + 75, [(side + 59, side + 10), (side + 1, side + 75)]),
    ):
        shape = (len(sizes), len(detector.pixel_mean), height, width)
        images = torch.randint(0, 256, shape, generator=generator)
        yield images.float().to(detector.device), torch.tensor(sizes, device=detector.device)


def coarsest_stride(detector: Detector) -> int:
    neck = detector.neck
    stride = detector.backbone.output_shape()[neck.in_features[-1]].stride
    return stride * 2 ** len(neck.extra_convs)


@torch.no_grad()
def check_batches(run: Run, expected: Run, batches: Iterable[tuple[Tensor, Tensor]]) -> Differences:
    """The largest differences over all images of all batches."""
    return largest(
        compare_batch(expected(images, sizes), run(images, sizes), sizes)
        for images, sizes in batches
    )


def compare_batch(
    expected: Iterable[Detections], found: Iterable[Detections], sizes: Tensor
) -> Differences:
    """The largest differences over images of the sizes ``[B, 2]``."""
    return largest(
        compare(one, other, max(size))
        for one, other, size in zip(expected, found, sizes.tolist(), strict=True)
    )


def largest(differences: Iterable[Differences]) -> Differences:
    return Differences(*map(max, zip(*differences)))


def compare(expected: Detections, found: Detections, longer_side: int) -> Differences:
    """Compares the detections of an image; those that tie with the last one count by score alone.

    Args:
        longer_side: of the image, in pixels.
    """
    if len(expected.scores) != len(found.scores):
        return Differences(float("inf"), float("inf"))
    scores = (expected.scores - found.scores).abs()
    distances = (expected.boxes[:, None] - found.boxes[None]).abs().amax(-1) / longer_side
    others = expected.classes[:, None] != found.classes[None]
    nearest = distances.masked_fill(others, float("inf")).amin(1)
    certain = expected.scores > expected.scores[-1:] + LIMIT
    return Differences(
        scores.max().item() if len(scores) else 0.0,
        nearest[certain].max().item() if certain.any() else 0.0,
    )


def run_detector(detector: Detector) -> Run:
    """The detector as most exports see it."""
    model = ExportableDetector(detector)
    return lambda images, sizes: one_by_one(*model(images, sizes))


def run_program(path: Path) -> Run:
    """A file of ``torch.export.save``."""
    program = torch.export.load(path).module()
    return lambda images, sizes: one_by_one(*program(images, sizes))


def run_package(path: Path) -> Run:
    """A package of AOTInductor."""
    package = torch._inductor.aoti_load_package(str(path))
    return lambda images, sizes: one_by_one(*package(images, sizes))


def run_torchscript(path: Path) -> Run:
    """A file of TorchScript, which takes an image at a time."""
    traced = torch.jit.load(path)

    def run(images: Tensor, sizes: Tensor) -> Iterator[Detections]:
        for image, (height, width) in zip(images, sizes.tolist()):
            boxes, classes, scores, _ = traced(image[:, :height, :width])
            yield Detections(boxes, scores, classes)

    return run


def run_detector_one_by_one(detector: Detector) -> Run:
    """The detector as Detectron2 calls it, which leaves out empty boxes and low scores."""

    def run(images: Tensor, sizes: Tensor) -> Iterator[Detections]:
        for image, (height, width) in zip(images, sizes.tolist()):
            [output] = detector([{"image": image[:, :height, :width]}])
            found = output["instances"]
            yield Detections(found.pred_boxes.tensor, found.scores, found.pred_classes)

    return run


def one_by_one(boxes: Tensor, scores: Tensor, classes: Tensor) -> Iterator[Detections]:
    return map(Detections, boxes, scores, classes)
