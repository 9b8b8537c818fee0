"""Whether an ONNX file gives the detector's detections, proposals that tie set aside."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import ExportError
from ..modeling.detector import Detector
from ..modeling.postprocessing import Detections
from .check import LIMIT, Differences, compare_batch, largest, run_detector
from .onnx_file import OUTPUTS, check_packages


class Reordering(NamedTuple):
    """What a file ranks otherwise than the detector.

    Attributes:
        moved: the number of ranks that another proposal has.
        gap: the largest difference in score of the two that claim a rank, in logits.
    """

    moved: int
    gap: float


class OnnxFile:
    """A file that ONNX Runtime runs on the CPU, and that says which proposals it takes.

    Args:
        path: of the file.
        threads: how many; 0 takes one for each core.

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
        # The last choice is that of the detections; one before it is that of the proposals.
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
            best first; None where queries are learned.
        """
        inputs = {"images": images.numpy(), "image_sizes": sizes.numpy()}
        results = map(torch.from_numpy, self.session.run(self.outputs, inputs))
        boxes, scores, classes, *order = results
        return list(map(Detections, boxes, scores, classes)), order[0] if order else None


class TakeInOrder(TorchFunctionMode):
    """Lets the detector that runs under it take its proposals in a given order.

    Args:
        order: ``[B, Q]``, indices of tokens; None for a detector without proposals.

    Attributes:
        reordering: between the order and the detector's own.
    """

    def __init__(self, order: Tensor | None):
        super().__init__()
        self.order = order
        self.reordering = Reordering(0, 0.0)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        # As in the file, the first choice of the best is the proposals'.
        if function is not Tensor.topk or self.order is None:
            return results
        scores, order, self.order = args[0], self.order, None
        values = scores.gather(1, order)
        self.reordering = Reordering(
            int((results.indices != order).sum()), (results.values - values).abs().max().item()
        )
        return torch.return_types.topk((values, order))


@torch.no_grad()
def check_onnx(
    file: OnnxFile, detector: Detector, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Differences, Reordering]:
    """The largest differences of a file, and of its order of proposals, from the detector.

    Proposals whose scores are the same but for the last digits are ranked by rounding, and in DINO
    and H-DETR a query's content belongs to its rank. So the detector takes the proposals in the
    file's order: what still differs then, the file computes otherwise.

    Args:
        file: of :func:`save_onnx`.
        detector: that the file was made of, on the CPU.
        batches: images ``[B, 3, H, W]`` and their sizes ``[B, 2]``.

    Raises:
        ExportError: the order differs by more than rounding.
    """
    run = run_detector(detector)
    reorderings, differences = [], []
    for images, sizes in batches:
        found, order = file.run(images, sizes)
        with TakeInOrder(order) as taken:
            expected = list(run(images, sizes))
        differences.append(compare_batch(expected, found, sizes))
        reorderings.append(taken.reordering)
    reordering = Reordering(*map(max, zip(*reorderings)))
    if reordering.gap > LIMIT:
        raise ExportError(
            f"{file.path} ranks proposals otherwise, by {reordering.gap:.1e} in their logits, "
            f"where rounding makes less than {LIMIT:.0e}: the file is wrong"
        )
    return largest(differences), reordering
