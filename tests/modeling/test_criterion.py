"""The criterion, and generalised IoU."""

import itertools
import math

import pytest
import torch
from small_detectors import count
from torchvision.ops import box_convert, generalized_box_iou

from lite_detr.modeling import HungarianMatcher, SetCriterion
from lite_detr.modeling.criterion import Target, generalized_iou
from lite_detr.modeling.heads import Predictions

CLASSES = 3


def random_boxes(*shape):
    center = torch.rand(*shape, 2, dtype=torch.float64) * 0.6 + 0.2
    size = torch.rand(*shape, 2, dtype=torch.float64) * 0.3 + 0.05
    return torch.cat([center, size], dim=-1)


def make_targets(*counts):
    return [Target(torch.randint(0, CLASSES, (n,)), random_boxes(n)) for n in counts]


def make_predictions(batch, queries, requires_grad=False):
    logits = torch.randn(batch, queries, CLASSES, dtype=torch.float64) * 2
    boxes = random_boxes(batch, queries)
    return Predictions(logits.requires_grad_(requires_grad), boxes.requires_grad_(requires_grad))


def focal_terms(logit, alpha, gamma):
    """The focal loss of one logit where the class is there, and where it is not."""
    p = 1 / (1 + math.exp(-logit))
    positive = -alpha * (1 - p) ** gamma * math.log(p)
    negative = -(1 - alpha) * p**gamma * math.log(1 - p)
    return positive, negative


def giou(box, other):
    """Of two (cx, cy, w, h)."""
    left, right = [[b[axis] - b[axis + 2] / 2 for axis in (0, 1)] for b in (box, other)]
    ends, other_ends = [[b[axis] + b[axis + 2] / 2 for axis in (0, 1)] for b in (box, other)]
    inner, outer = 1.0, 1.0
    for axis in (0, 1):
        inner *= max(0.0, min(ends[axis], other_ends[axis]) - max(left[axis], right[axis]))
        outer *= max(ends[axis], other_ends[axis]) - min(left[axis], right[axis])
    union = box[2] * box[3] + other[2] * other[3] - inner
    return inner / union - (outer - union) / outer


def pair_cost(logits, box, label, target_box, weights, alpha, gamma):
    positive, negative = focal_terms(logits[label], alpha, gamma)
    distance = sum(abs(a - b) for a, b in zip(box, target_box))
    costs = (positive - negative, distance, -giou(box, target_box))
    return sum(weight * cost for weight, cost in zip(weights, costs))


def best_assignment(logits, boxes, target, weights=(2, 5, 2), alpha=0.25, gamma=2.0):
    """The cheapest set of (query, object) pairs of all that there are."""
    costs = [
        [
            pair_cost(row, box, label, target_box, weights, alpha, gamma)
            for label, target_box in zip(target.labels.tolist(), target.boxes.tolist())
        ]
        for row, box in zip(logits.tolist(), boxes.tolist())
    ]
    queries, objects = range(len(logits)), range(len(target.labels))
    if len(objects) <= len(queries):
        candidates = [
            list(zip(order, objects)) for order in itertools.permutations(queries, len(objects))
        ]
    else:
        candidates = [
            list(zip(queries, order)) for order in itertools.permutations(objects, len(queries))
        ]
    return set(min(candidates, key=lambda pairs: sum(costs[q][o] for q, o in pairs)))


MATCHERS = [
    ((2.0, 5.0, 2.0), 0.25, 2.0),
    ((1.0, 0.001, 0.0), 0.25, 2.0),
    ((0.0, 1.0, 0.0), 0.25, 2.0),
    ((0.0, 0.0, 1.0), 0.25, 2.0),
    ((3.0, 0.5, 1.0), 0.6, 1.5),
]


@pytest.mark.parametrize("weights, alpha, gamma", MATCHERS)
def test_matcher_equals_brute_force(weights, alpha, gamma):
    """Including an image without objects and one with more objects than queries."""
    counts = (3, 1, 0, 5, 7)
    predictions, targets = make_predictions(len(counts), 5), make_targets(*counts)
    matches = HungarianMatcher(*weights, alpha=alpha, gamma=gamma)(predictions, targets)
    assert len(matches) == len(counts)
    for (queries, objects), logits, boxes, target in zip(matches, *predictions, targets):
        assert queries.dtype == objects.dtype == torch.int64
        assert len(queries) == len(objects) == min(5, len(target.labels))
        pairs = set(zip(queries.tolist(), objects.tolist()))
        assert pairs == best_assignment(logits, boxes, target, weights, alpha, gamma)


def test_cost_by_hand():
    (logits,), (boxes,) = make_predictions(1, 4)
    (target,) = make_targets(3)
    cost = HungarianMatcher(1.5, 4.0, 3.0, alpha=0.4, gamma=1.0).cost(logits, boxes, target)
    expected = [
        [
            pair_cost(row, box, label, other, (1.5, 4.0, 3.0), 0.4, 1.0)
            for label, other in zip(target.labels.tolist(), target.boxes.tolist())
        ]
        for row, box in zip(logits.tolist(), boxes.tolist())
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    # The logarithms are kept finite by 1e-8, so that the last digits differ.
    torch.testing.assert_close(cost, expected, rtol=0, atol=1e-6)


def test_matcher_survives_certain_predictions():
    """Probabilities of exactly 0 and 1 in float32."""
    predictions = Predictions(torch.tensor([[[200.0], [-200.0]]]), torch.rand(1, 2, 4))
    target = Target(torch.tensor([0]), predictions.boxes[0, 1:])
    queries, objects = HungarianMatcher(cost_bbox=0.0, cost_giou=0.0)(predictions, [target])[0]
    assert (queries.tolist(), objects.tolist()) == ([0], [0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["logits", "boxes"])
def test_a_prediction_that_is_not_finite_reaches_the_loss(field, value):
    """Also of a box that is far from being the best match, for 1 object and 4 queries."""
    predictions, targets = make_predictions(2, 4), make_targets(1, 2)
    getattr(predictions, field)[0, 2] = value
    losses = SetCriterion(HungarianMatcher())({"": predictions}, targets, count(targets))
    named = ("loss_ce",) if field == "logits" else ("loss_bbox", "loss_giou")
    assert not any(losses[name].isfinite() for name in named)


@pytest.mark.parametrize("where", ["image without objects", "class without objects"])
def test_a_logit_that_is_not_finite_reaches_the_loss_wherever_it_is(where):
    predictions, targets = make_predictions(2, 4), make_targets(2, 0)
    targets[0].labels.fill_(1)
    image, channel = (1, 0) if where == "image without objects" else (0, 2)
    predictions.logits[image, 3, channel] = math.nan
    losses = SetCriterion(HungarianMatcher())({"": predictions}, targets, count(targets))
    assert losses["loss_ce"].isnan()


def losses_by_hand(predictions, targets, num_objects, weights):
    focal, distance, overlap = 0.0, 0.0, 0.0
    for logits, boxes, target in zip(*predictions, targets):
        pairs = best_assignment(logits.detach(), boxes.detach(), target)
        labels = {query: int(target.labels[obj]) for query, obj in pairs}
        for query, row in enumerate(logits.tolist()):
            for channel, logit in enumerate(row):
                positive, negative = focal_terms(logit, 0.25, 2.0)
                focal += positive if labels.get(query) == channel else negative
        for query, obj in pairs:
            box, target_box = boxes[query].tolist(), target.boxes[obj].tolist()
            distance += sum(abs(a - b) for a, b in zip(box, target_box))
            overlap += 1 - giou(box, target_box)
    names = ("loss_ce", "loss_bbox", "loss_giou")
    sums = (focal, distance, overlap)
    return {n: weight * s / num_objects for n, weight, s in zip(names, weights, sums)}


@pytest.mark.parametrize("weights", [(2.0, 5.0, 2.0), (1.0, 3.0, 0.5)])
def test_losses_by_hand(weights):
    """Weights of the losses are not those of the matcher."""
    outputs = {"": make_predictions(2, 4), "_0": make_predictions(2, 4)}
    targets = make_targets(2, 3)
    losses = SetCriterion(HungarianMatcher(), *weights)(outputs, targets, count(targets))
    expected = {}
    for suffix, predictions in outputs.items():
        by_hand = losses_by_hand(predictions, targets, 5, weights)
        expected |= {name + suffix: value for name, value in by_hand.items()}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-9)


def test_each_set_of_predictions_is_matched_on_its_own():
    targets = make_targets(2)
    first = Predictions(torch.randn(1, 2, CLASSES).double(), targets[0].boxes[None])
    flipped = Predictions(first.logits.flip(1), first.boxes.flip(1))
    losses = SetCriterion(HungarianMatcher())({"": first, "_0": flipped}, targets, count(targets))
    assert losses["loss_bbox"] == losses["loss_bbox_0"] == 0
    torch.testing.assert_close(losses["loss_ce"], losses["loss_ce_0"])


def test_losses_are_normalised_by_the_number_of_objects():
    """A batch of the same image twice has the losses of one."""
    predictions, targets = make_predictions(1, 4), make_targets(3)
    criterion = SetCriterion(HungarianMatcher())
    once = criterion({"": predictions}, targets, count(targets))
    twice = Predictions(*(tensor.expand(2, -1, -1) for tensor in predictions))
    twice = criterion({"": twice}, targets * 2, count(targets * 2))
    torch.testing.assert_close(twice, once)


def test_batch_without_objects():
    """Classification alone is left to learn, and divided by one."""
    predictions, targets = make_predictions(2, 4, requires_grad=True), make_targets(0, 0)
    losses = SetCriterion(HungarianMatcher())({"": predictions}, targets, count(targets))
    expected = losses_by_hand(predictions, targets, 1, (2.0, 5.0, 2.0))
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-9)
    assert losses["loss_bbox"] == losses["loss_giou"] == 0
    assert all(loss.requires_grad for loss in losses.values())
    sum(losses.values()).backward()
    assert predictions.logits.grad.all()
    assert torch.equal(predictions.boxes.grad, torch.zeros(2, 4, 4, dtype=torch.float64))


def test_gradients_reach_matched_boxes_alone():
    predictions, targets = make_predictions(1, 4, requires_grad=True), make_targets(2)
    losses = SetCriterion(HungarianMatcher())({"": predictions}, targets, count(targets))
    sum(losses.values()).backward()
    pairs = best_assignment(*(tensor[0].detach() for tensor in predictions), targets[0])
    reached = predictions.boxes.grad[0].any(-1).nonzero().flatten().tolist()
    assert reached == sorted(query for query, _ in pairs)
    assert predictions.logits.grad.all()


def test_proposals_are_trained_on_objects_of_any_class(make_detector, make_input):
    """The criterion sees labels 0 for the encoder's proposals, and the true ones elsewhere."""
    model = make_detector("two_stage")
    seen = {}

    class Recorder(SetCriterion):
        def forward(self, outputs, targets, num_objects):
            seen.update(dict.fromkeys(outputs, targets))
            return super().forward(outputs, targets, num_objects)

    model.criterion = Recorder(HungarianMatcher())
    inputs = [make_input(64, 64, objects=4), make_input(64, 96, objects=0)]
    inputs[0]["instances"].gt_classes = torch.tensor([3, 0, 4, 1])
    model(inputs)
    assert set(seen) == {"", "_0", "_enc"}
    for suffix in ("", "_0"):
        assert [target.labels.tolist() for target in seen[suffix]] == [[3, 0, 4, 1], []]
    assert [target.labels.tolist() for target in seen["_enc"]] == [[0] * 4, []]
    for target, agnostic in zip(seen[""], seen["_enc"]):
        assert torch.equal(target.boxes, agnostic.boxes)


def test_targets_are_normalised_by_the_images_own_size(make_input):
    instances = make_input(50, 80, objects=1)["instances"]
    instances.gt_boxes.tensor = torch.tensor([[8.0, 10.0, 24.0, 40.0]])
    target = Target.from_instances(instances, torch.float64)
    expected = torch.tensor([[0.2, 0.5, 0.2, 0.6]], dtype=torch.float64)
    torch.testing.assert_close(target.boxes, expected)
    assert torch.equal(target.labels, instances.gt_classes)


def random_corners(count):
    return torch.cat([torch.rand(count, 2), 0.05 + 0.5 * torch.rand(count, 2)], dim=1).double()


def test_pairs_and_matrix_equal_torchvision():
    torch.manual_seed(0)
    boxes, others = random_corners(6), random_corners(6)
    expected = generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (boxes, others)))
    torch.testing.assert_close(generalized_iou(boxes[:, None], others), expected)
    torch.testing.assert_close(generalized_iou(boxes, others), expected.diagonal())


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
def test_by_hand(eps):
    """Two 2x2 boxes that share a 1x1 corner: union 7, enclosing area 9."""
    boxes = torch.tensor([[1.0, 1.0, 2.0, 2.0]], dtype=torch.float64)
    others = torch.tensor([[2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    expected = 1 / (7 + eps) - 2 / (9 + eps)
    assert generalized_iou(boxes, others, eps).item() == pytest.approx(expected, rel=1e-12)


def test_boxes_apart():
    """Unit boxes four apart: no overlap, union 2, enclosing area 5."""
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [4.5, 0.5, 1.0, 1.0]])
    assert generalized_iou(boxes[0], boxes[1]).item() == pytest.approx(-0.6)


def test_epsilon_keeps_boxes_without_area_finite():
    point = torch.tensor([0.3, 0.3, 0.0, 0.0], requires_grad=True)
    iou = generalized_iou(point, torch.tensor([0.3, 0.3, 0.0, 0.0]), 1e-6)
    iou.backward()
    assert iou == 0 and point.grad.isfinite().all()
