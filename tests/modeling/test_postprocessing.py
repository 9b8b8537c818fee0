import pytest
import torch
from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_convert

from lite_detr.modeling.heads import Predictions
from lite_detr.modeling.postprocessing import best_detections, detector_instances

CLASSES = 5
# As the detector sees them, and as they are asked for.
IMAGE_SIZES = [(64, 96), (800, 1066), (33, 127), (1, 200), (480, 640)]
OUTPUT_SIZES = [(64, 96), (427, 640), (481, 77), (7, 1333), (960, 1280)]


def image_by_image(predictions, image_sizes, output_sizes, score_thresh, limit):
    """Detectron2's way, which waits for a GPU several times an image."""
    results = []
    for logits, boxes, size, output_size in zip(*predictions, image_sizes, output_sizes):
        scores, indices = logits.sigmoid().flatten().topk(min(limit, logits.numel()))
        keep = scores > score_thresh
        scores, indices = scores[keep], indices[keep]
        boxes = box_convert(boxes[indices // CLASSES], "cxcywh", "xyxy")
        height, width = size
        instances = Instances(
            size,
            pred_boxes=Boxes(boxes * boxes.new_tensor([width, height, width, height])),
            scores=scores,
            pred_classes=indices % CLASSES,
        )
        results.append(detector_postprocess(instances, *output_size))
    return results


def random_predictions(dtype=torch.float32, batch=5, queries=64):
    """Boxes of which many leave their image, and some have no area within it.

    An image's 320 scores are a multiple of what a CPU's vector instructions compute at once: the
    last numbers of a tensor, which do not fill a vector, may differ in their last bit.
    """
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(batch, queries, CLASSES, generator=generator, dtype=dtype)
    boxes = torch.rand(batch, queries, 4, generator=generator, dtype=dtype)
    boxes[:, ::4, :2] = 3 * boxes[:, ::4, :2] - 1
    boxes[:, 1::8, 2] = 0
    boxes[:, 2::8, 3] = 0
    boxes[:, 3::16] = 0
    return Predictions(logits, boxes)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        assert ours.image_size == theirs.image_size
        assert ours.get_fields().keys() == theirs.get_fields().keys()
        for name, value in (ours.get_fields() | {"pred_boxes": ours.pred_boxes.tensor}).items():
            other = theirs.get(name)
            other = other.tensor if name == "pred_boxes" else other
            assert value.dtype == other.dtype and torch.equal(value, other), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [1, 100, 1000])
@pytest.mark.parametrize("score_thresh", [0.0, 0.7, 1.0])
def test_same_bits_as_image_by_image(dtype, limit, score_thresh):
    arguments = (random_predictions(dtype), IMAGE_SIZES, OUTPUT_SIZES, score_thresh, limit)
    expected = image_by_image(*arguments)
    assert_same(detector_instances(*arguments), expected)
    numbers = [len(instances) for instances in expected]
    if limit > 1 and score_thresh < 1:
        assert len(set(numbers)) > 1, "images that keep different numbers"
        assert 0 < max(numbers) < min(limit, 64 * CLASSES), "some boxes are empty"
    if score_thresh == 1:
        assert not any(numbers)


def test_same_to_the_last_bit_of_scores_for_any_number_of_queries():
    arguments = (random_predictions(queries=7), IMAGE_SIZES, OUTPUT_SIZES, 0.5, 100)
    for ours, theirs in zip(detector_instances(*arguments), image_by_image(*arguments)):
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=2e-7, atol=0)
        assert torch.equal(ours.pred_classes, theirs.pred_classes)
        assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)


def test_equal_scores_keep_their_order():
    predictions = random_predictions()
    predictions = Predictions(predictions.logits.round(), predictions.boxes)
    arguments = (predictions, IMAGE_SIZES, OUTPUT_SIZES, 0.0, 100)
    assert_same(detector_instances(*arguments), image_by_image(*arguments))


def test_nan_scores_are_dropped():
    predictions = random_predictions()
    predictions.logits[1, :7] = float("nan")
    arguments = (predictions, IMAGE_SIZES, OUTPUT_SIZES, 0.0, 100)
    found = detector_instances(*arguments)
    assert_same(found, image_by_image(*arguments))
    assert all(instances.scores.isfinite().all() for instances in found)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_box_that_is_not_finite_is_an_error_if_it_would_be_kept(value):
    predictions = random_predictions()
    predictions.logits[3, 5, 2], predictions.logits[3, 6] = 9.0, -9.0
    predictions.boxes[3, 6] = value
    detector_instances(predictions, IMAGE_SIZES, OUTPUT_SIZES, 0.5, 100)
    predictions.boxes[3, 5, 1] = value
    with pytest.raises(FloatingPointError, match="boxes of image 3 in the batch are NaN or inf"):
        detector_instances(predictions, IMAGE_SIZES, OUTPUT_SIZES, 0.5, 100)


class Waits:
    """Counts what makes the CPU wait for a GPU: numbers that Python reads, and masks' sizes."""

    READS = {"__bool__", "__float__", "__index__", "__int__", "cpu", "item", "numpy", "tolist"}
    SIZES = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}

    def __init__(self):
        waits = self
        self.number = 0

        class Reads(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                waits.number += getattr(function, "__name__", "") in waits.READS
                with torch._C.DisableTorchFunction():
                    return function(*args, **(kwargs or {}))

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                name = function.name().partition(".")[0]
                masks = args[1] if name == "aten::index" else ()
                masked = any(m is not None and m.dtype == torch.bool for m in masks)
                waits.number += name in waits.SIZES or masked
                return function(*args, **(kwargs or {}))

        self.modes = Reads(), Sizes()

    def count(self, function, *arguments):
        reads, sizes = self.modes
        with reads, sizes:
            function(*arguments)
        return self.number


@pytest.mark.parametrize("batch", [1, 5])
def test_one_wait_for_the_device_a_batch(batch):
    predictions = random_predictions(batch=batch)
    arguments = (predictions, IMAGE_SIZES[:batch], OUTPUT_SIZES[:batch], 0.5, 100)
    assert Waits().count(detector_instances, *arguments) == 1
    # And that the count sees waits at all:
    assert Waits().count(image_by_image, *arguments) >= 3 * batch


def test_best_detections_by_hand():
    logits = torch.tensor([[[0.0, 3.0], [2.0, -1.0]], [[-2.0, 1.0], [5.0, 4.0]]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]).expand(2, 2, 4)
    sizes = torch.tensor([[10, 20], [100, 200]])
    boxes, scores, classes = best_detections(Predictions(logits, boxes), sizes, 3)
    assert classes.tolist() == [[1, 0, 0], [0, 1, 1]]
    logits = torch.tensor([[3.0, 2.0, 0.0], [5.0, 4.0, 1.0]])
    torch.testing.assert_close(scores, logits.sigmoid())
    first, second = [8.0, 3.0, 12.0, 7.0], [0.0, 0.0, 10.0, 10.0]
    torch.testing.assert_close(boxes[0], torch.tensor([first, second, first]))
    torch.testing.assert_close(boxes[1], 10 * torch.tensor([second, second, first]))


def test_best_detections_can_be_exported():
    """With any number of images, in whatever sizes."""

    class Ranking(torch.nn.Module):
        def forward(self, logits, boxes, image_sizes):
            return tuple(best_detections(Predictions(logits, boxes), image_sizes, 100))

    predictions, sizes = random_predictions(), torch.tensor(IMAGE_SIZES)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Ranking(), (*predictions, sizes), dynamic_shapes=({0: batch},) * 3
    )
    for tensors in ((*predictions, sizes), [t[3:] for t in (*predictions, sizes)]):
        for found, expected in zip(program.module()(*tensors), Ranking()(*tensors)):
            assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit.trace:FutureWarning")
def test_a_trace_of_detectron2_follows_sizes_and_numbers():
    """``TracingAdapter`` gives sizes as tensors; the trace must not hold what it has seen."""

    def fields(logits, boxes, size, output_size):
        sizes = [tuple(size)], [tuple(output_size)]
        (instances,) = detector_instances(Predictions(logits, boxes), *sizes, 0.7, 100)
        values = instances.get_fields() | {"pred_boxes": instances.pred_boxes.tensor}
        return instances.image_size, *values.values()

    logits, boxes = random_predictions()
    sizes = list(zip(torch.tensor(IMAGE_SIZES), torch.tensor(OUTPUT_SIZES)))
    traced = torch.jit.trace(fields, (logits[:1], boxes[:1], *sizes[0]))
    expected = image_by_image((logits, boxes), IMAGE_SIZES, OUTPUT_SIZES, 0.7, 100)
    for index, instances in enumerate(expected):
        image = slice(index, index + 1)
        size, boxes_, scores, classes = traced(logits[image], boxes[image], *sizes[index])
        assert tuple(size.tolist()) == instances.image_size
        assert torch.equal(scores, instances.scores)
        assert torch.equal(classes, instances.pred_classes)
        torch.testing.assert_close(boxes_, instances.pred_boxes.tensor)
