"""Compare the detections of an exported file with the detector's."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import ExportError
from ..modeling.detector import Detector
from ..modeling.postprocessing import Detections
from ..modeling.queries import ProposalQueries
from .model import ExportableDetector
from .onnx_file import OUTPUTS, check_packages

# Images [B, 3, H, W] and their sizes [B, 2] -> the detections of each image.
Run = Callable[[Tensor, Tensor], Iterator[Detections]]


class Limits(NamedTuple):
    """The largest differences that rounding may cause.

    Attributes:
        scores: of detections.
        boxes: as a share of the image's longer side.
        logits: of proposals that are ranked differently.
    """

    scores: float
    boxes: float
    logits: float


# Of files of a type.
LIMITS = {
    "float32": Limits(1e-4, 1e-4, 1e-4),
    "float16": Limits(1e-2, 2e-3, 0.1),
    "float16-decoder": Limits(1e-2, 2e-3, 1e-4),
}
FLOAT_LIMITS = LIMITS["float32"]


class Differences(NamedTuple):
    """The largest differences between two sets of detections.

    Attributes:
        scores: between detections of the same rank; infinite if their numbers differ.
        boxes: between a detection and the nearest of its class, as a share of the image's longer
            side.
    """

    scores: float
    boxes: float


class Reordering(NamedTuple):
    """The difference between a file's ranking of proposals and the detector's.

    Attributes:
        moved: the number of ranks with another proposal.
        gap: the largest difference between the scores of a rank's two proposals, in logits.
    """

    moved: int
    gap: float


def sample_batches(detector: Detector) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images of noise and their sizes: one, two of one size, and two with noisy padding.

    They are about as small as the coarsest map and the number of queries permit, and no size is a
    multiple of a stride.
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
    """Return the largest differences over all images of all batches."""
    return largest(
        compare_batch(expected(images, sizes), run(images, sizes), sizes)
        for images, sizes in batches
    )


def compare_batch(
    expected: Iterable[Detections],
    found: Iterable[Detections],
    sizes: Tensor,
    limits: Limits = FLOAT_LIMITS,
) -> Differences:
    """Return the largest differences over images of the sizes ``[B, 2]``."""
    return largest(
        compare(one, other, max(size), limits)
        for one, other, size in zip(expected, found, sizes.tolist(), strict=True)
    )


def largest(differences: Iterable[Differences]) -> Differences:
    return Differences(*map(max, zip(*differences)))


def compare(
    expected: Detections, found: Detections, longer_side: int, limits: Limits = FLOAT_LIMITS
) -> Differences:
    """Compare the detections of one image.

    Of detections that tie with the last one only the scores count: rounding decides which of them
    are included.

    Args:
        expected, found: the two sets of detections.
        longer_side: of the image, in pixels.
        limits: scores that differ by less tie.
    """
    if len(expected.scores) != len(found.scores):
        return Differences(float("inf"), float("inf"))
    scores = (expected.scores - found.scores).abs()
    distances = (expected.boxes[:, None] - found.boxes[None]).abs().amax(-1) / longer_side
    others = expected.classes[:, None] != found.classes[None]
    nearest = distances.masked_fill(others, float("inf")).amin(1)
    certain = expected.scores > expected.scores[-1:] + limits.scores
    return Differences(
        scores.max().item() if len(scores) else 0.0,
        nearest[certain].max().item() if certain.any() else 0.0,
    )


def run_detector(detector: Detector) -> Run:
    """Return the detector as most exports see it, a function of a padded batch."""
    model = ExportableDetector(detector)
    return lambda images, sizes: split_batch(*model(images, sizes))


def run_detector_one_by_one(detector: Detector) -> Run:
    """Return the detector as Detectron2 calls it, without empty boxes and low scores."""

    def run(images: Tensor, sizes: Tensor) -> Iterator[Detections]:
        for image, (height, width) in zip(images, sizes.tolist()):
            [output] = detector([{"image": image[:, :height, :width]}])
            found = output["instances"]
            yield Detections(found.pred_boxes.tensor, found.scores, found.pred_classes)

    return run


def run_program(path: Path) -> Run:
    """Load a file of ``torch.export.save``; it can run code, so load none but your own."""
    program = torch.export.load(path).module()
    return lambda images, sizes: split_batch(*program(images, sizes))


def run_package(path: Path) -> Run:
    """Load a package of AOTInductor, which is machine code: load none but your own."""
    # PyTorch documents AOTInductor under this private name; it has no other.
    package = torch._inductor.aoti_load_package(str(path))
    return lambda images, sizes: split_batch(*package(images, sizes))


def run_torchscript(path: Path) -> Run:
    """Load a file of TorchScript, which takes one image at a time; it is a program, too."""
    traced = torch.jit.load(path)

    def run(images: Tensor, sizes: Tensor) -> Iterator[Detections]:
        for image, (height, width) in zip(images, sizes.tolist()):
            boxes, classes, scores, _ = traced(image[:, :height, :width])
            yield Detections(boxes, scores, classes)

    return run


def split_batch(boxes: Tensor, scores: Tensor, classes: Tensor) -> Iterator[Detections]:
    """Yield the detections of each image of a batch."""
    return map(Detections, boxes, scores, classes)


class OnnxFile:
    """An ONNX file that ONNX Runtime runs on the CPU, with its ranking of the proposals.

    Args:
        path: of the file.
        threads: the number of threads; 0 uses one per core.

    Raises:
        ExportError: a package is not installed.
    """

    def __init__(self, path: Path, threads: int = 0):
        check_packages("onnx", "onnxruntime")
        import onnx
        import onnxruntime

        self.path = path
        model = onnx.load(path)
        self.outputs = list(OUTPUTS)
        # The last TopK chooses the detections; the one before it chooses the proposals, if any.
        *choices, _ = (node.output[1] for node in model.graph.node if node.op_type == "TopK")
        for order in choices:
            kind = onnx.TensorProto.INT64
            model.graph.output.append(onnx.helper.make_tensor_value_info(order, kind, None))
            self.outputs.append(order)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, images: Tensor, sizes: Tensor) -> tuple[list[Detections], Tensor | None]:
        """
        Args:
            images: ``[B, 3, H, W]``
            sizes: ``[B, 2]``

        Returns:
            The detections of each image, and the tokens ``[B, Q]`` whose proposals become queries,
            best first; None if queries are learned.
        """
        inputs = {"images": images.numpy(), "image_sizes": sizes.numpy()}
        results = map(torch.from_numpy, self.session.run(self.outputs, inputs))
        boxes, scores, classes, *order = results
        return list(split_batch(boxes, scores, classes)), order[-1] if order else None


class ProposalOrder(TorchFunctionMode):
    """A context in which the detector takes its proposals in a given order.

    Args:
        order: ``[B, Q]``, indices of tokens; None for a detector without proposals.

    Attributes:
        reordering: how the order differs from the detector's own.
    """

    def __init__(self, order: Tensor | None):
        super().__init__()
        self.order = order
        self.reordering = Reordering(0, 0.0)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        # As in the file, the first TopK chooses the proposals. Sorted tokens have another shape.
        if function is not Tensor.topk or self.order is None:
            return results
        if results.indices.shape != self.order.shape:
            return results
        scores, order, self.order = args[0], self.order, None
        values = scores.gather(1, order)
        self.reordering = Reordering(
            int((results.indices != order).sum()), (results.values - values).abs().max().item()
        )
        return torch.return_types.topk((values, order))


@torch.no_grad()
def check_onnx(
    file: OnnxFile,
    detector: Detector,
    batches: Iterable[tuple[Tensor, Tensor]],
    limits: Limits = FLOAT_LIMITS,
) -> tuple[Differences, Reordering]:
    """Return the largest differences of a file, and of its ranking, from the detector.

    Proposals whose scores agree but for the last digits are ranked by rounding, and in DINO and
    H-DETR a query's content belongs to its rank. So the detector takes the proposals in the file's
    order: any difference that remains is an error of the file.

    Args:
        file: written by :func:`save_onnx`.
        detector: the file's detector, on the CPU.
        batches: images ``[B, 3, H, W]`` and their sizes ``[B, 2]``.
        limits: of the file's type.

    Raises:
        ExportError: the ranking differs by more than rounding.
    """
    run = run_detector(detector)
    # Others choose tokens as well, but by no proposals.
    has_proposals = isinstance(detector.queries, ProposalQueries)
    reorderings, differences = [], []
    for images, sizes in batches:
        found, order = file.run(images, sizes)
        with ProposalOrder(order if has_proposals else None) as given:
            expected = list(run(images, sizes))
        differences.append(compare_batch(expected, found, sizes, limits))
        reorderings.append(given.reordering)
    reordering = Reordering(*map(max, zip(*reorderings)))
    if not reordering.gap <= limits.logits:
        raise ExportError(
            f"{file.path} ranks proposals otherwise, by {reordering.gap:.1e} in their logits, "
            f"where rounding makes less than {limits.logits:.0e}: the file is wrong"
        )
    return largest(differences), reordering
