"""Losses and matchers of newer recipes: against their authors' code, and in the detectors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from small_detectors import CONFIGS, assert_trains, loss_names, small_config, small_inputs

from lite_detr.baselines import SoftmaxCriterion
from lite_detr.errors import ConfigError
from lite_detr.modeling import (
    CriteriaByOutput,
    GIoUAwareLoss,
    HighOrderMatcher,
    HungarianMatcher,
    IoUAwareLoss,
    MatchabilityLoss,
    MixedDecoderLayer,
    MixedMatcher,
    OneToManyCriterion,
    OneToManyMatcher,
    PositionModulatedMatcher,
    PositionSupervisedLoss,
    SetCriterion,
    UnionCriterion,
    VarifocalLoss,
)
from lite_detr.modeling.criterion import Pairs, Target
from lite_detr.modeling.heads import Predictions
from lite_detr.modeling.supervision import unite

FOLDER = Path(__file__).parents[1] / "golden" / "losses"
CASES = sorted(file.stem for file in FOLDER.glob("*.npz"))
CLOSE = dict(rtol=1e-9, atol=1e-12)


class Case:
    """What the authors' code was given and what it returned, see tests/golden/README.md."""

    def __init__(self, name):
        with np.load(FOLDER / f"{name}.npz") as file:
            values = dict(file)
        self.hyper = json.loads(str(values.pop("hyper_json")))
        self.values = {key: torch.from_numpy(np.asarray(value)) for key, value in values.items()}
        images = range(len(self["pred_boxes"]))
        self.targets = [
            Target(self[f"targets.labels_{i}"], self[f"targets.boxes_{i}"]) for i in images
        ]
        self.num_objects = torch.tensor(self.hyper["num_boxes"], dtype=torch.float64)

    def __getitem__(self, key):
        return self.values[key]

    def predictions(self, start=""):
        logits, boxes = (self[f"{start}pred_{part}"].clone() for part in ("logits", "boxes"))
        return Predictions(logits.requires_grad_(), boxes.requires_grad_())

    def matches(self, name):
        images = range(len(self.targets))
        return [(self[f"{name}.src_{i}"], self[f"{name}.tgt_{i}"]) for i in images]


def criterion_of(name, hyper):
    """The criterion of a case, and the name of its class loss there."""
    if name.startswith("align_detr"):
        matcher = MixedMatcher(hyper["match_number"], hyper["tau"], giou_eps=1e-6)
        loss = IoUAwareLoss(hyper["alpha"], hyper["gamma"])
        return SetCriterion(matcher, giou_eps=1e-6, class_loss=loss), "class"
    if name.startswith("stable_dino"):
        matcher = PositionModulatedMatcher(hyper["cec_beta"], giou_eps=1e-6)
        loss = PositionSupervisedLoss(
            hyper["alpha"], hyper["gamma"], hyper["ta_alpha"], hyper["ta_beta"]
        )
        return SetCriterion(matcher, giou_eps=1e-6, class_loss=loss), "class"
    if name.startswith("rank_detr"):
        start = 0 if hyper["high_order"] else 1
        matcher = HighOrderMatcher(start, hyper["iou_order_alpha"], giou_eps=1e-6)
        loss = GIoUAwareLoss(hyper["alpha"], hyper["gamma"])
        return SetCriterion(matcher, giou_eps=1e-6, class_loss=loss), "class"
    if name.startswith("rt_detr"):
        loss = VarifocalLoss(hyper["alpha"], hyper["gamma"])
        return SetCriterion(HungarianMatcher(), class_loss=loss), "vfl"
    if name.startswith("deim"):
        loss = MatchabilityLoss(hyper["gamma"], hyper["mal_alpha"] or 1.0)
        return UnionCriterion(HungarianMatcher(), class_loss=loss), "mal"
    return SetCriterion(HungarianMatcher()), "ce"


def assert_losses(losses, predictions, case, names, start=""):
    """Losses and their gradients, both before weighting, are those of a case."""
    for ours, theirs in names.items():
        torch.testing.assert_close(losses[ours], case[f"loss.{theirs}"], **CLOSE)
        found = torch.autograd.grad(
            losses[ours], predictions, retain_graph=True, materialize_grads=True
        )
        for gradient, part in zip(found, ("logits", "boxes")):
            torch.testing.assert_close(gradient, case[f"grad.{theirs}.{start}{part}"], **CLOSE)


def pair_sets(matches):
    return [sorted(zip(match[0].tolist(), match[1].tolist())) for match in matches]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_authors_code(name):
    """Costs, matches, losses and gradients, in float64."""
    case = Case(name)
    criterion, class_loss = criterion_of(name, case.hyper)
    predictions = case.predictions()
    for image, cost in enumerate(criterion.matcher.costs(predictions, case.targets)):
        torch.testing.assert_close(cost, case[f"cost_{image}"], **CLOSE)
    matches = criterion.matcher(predictions, case.targets)
    assert pair_sets(matches) == pair_sets(case.matches("match"))
    losses = criterion.losses(predictions, case.targets, matches, case.num_objects)
    names = {"loss_ce": class_loss, "loss_bbox": "bbox", "loss_giou": "giou"}
    assert_losses(losses, predictions, case, names)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("align_detr")])
def test_known_pairs_of_align_detr_are_not_weighed(name):
    """Those of the denoising queries: in the file, query j + 1 and object j."""
    case = Case(name)
    criterion, _ = criterion_of(name, case.hyper)
    counts = [len(target.labels) for target in case.targets]
    matches = [(torch.arange(count) + 1, torch.arange(count)) for count in counts]
    losses = criterion.losses(case.predictions(), case.targets, matches, case.num_objects)
    for ours, theirs in {"loss_ce": "class", "loss_bbox": "bbox", "loss_giou": "giou"}.items():
        torch.testing.assert_close(losses[ours], case[f"given_pairs.{theirs}"], **CLOSE)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("deim")])
def test_union_of_layers_equals_deims(name):
    case = Case(name)
    layers = [case.matches(part) for part in ("match", *(f"union.layer{i}" for i in range(3)))]
    union = unite(layers)
    assert pair_sets(union) == pair_sets(case.matches("union"))
    pairs = Pairs.gather(case.predictions(), case.targets, union)
    count = torch.tensor(case.hyper["num_boxes_union"])
    losses = SetCriterion(HungarianMatcher()).losses_of_pairs(
        case.predictions().logits, pairs, pairs, count
    )
    for part in ("bbox", "giou"):
        torch.testing.assert_close(losses[f"loss_{part}"], case[f"union.loss.{part}"], **CLOSE)


def test_box_losses_of_a_union_are_means_over_it():
    """The same layer twice: its own pairs, and the losses of a mean over them."""
    case = Case("deim_mal_1")
    criterion = UnionCriterion(HungarianMatcher(), 1.0, 1.0, 1.0, class_loss=MatchabilityLoss())
    layer = case.predictions()
    losses = criterion({"": layer, "_0": layer}, case.targets, case.num_objects)
    for name, theirs in {"loss_ce": "mal", "loss_bbox": "bbox", "loss_giou_0": "giou"}.items():
        torch.testing.assert_close(losses[name], case[f"loss.{theirs}"], **CLOSE)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("ms_detr")])
def test_one_to_many_supervision_equals_ms_detrs(name):
    case = Case(name)
    hyper = case.hyper
    matcher = OneToManyMatcher(hyper["threshold"], hyper["k"], hyper["quality_iou"])
    predictions = case.predictions("o2m.")
    for image, cost in enumerate(matcher.costs(predictions, case.targets)):
        torch.testing.assert_close(-cost.T, case[f"o2m.quality_{image}"], **CLOSE)
    matches = matcher(predictions, case.targets)
    assert pair_sets(matches) == pair_sets(case.matches("o2m.match"))
    losses = OneToManyCriterion(matcher).losses(
        predictions, case.targets, matches, case.num_objects
    )
    names = {f"loss_{part}": f"{part}_o2m" for part in ("ce", "bbox", "giou")}
    assert_losses(losses, predictions, case, names, "o2m_")


def test_of_too_many_fitting_queries_some_are_drawn():
    target = Target(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
    predictions = Predictions(torch.zeros(1, 8, 1), target.boxes.expand(1, 8, 4))
    (queries, _) = OneToManyMatcher()(predictions, [target])[0]
    assert len(queries) == 2  # a quarter of 8


def test_crowded_images_match_fewer_queries_to_an_object():
    """At most half of the queries, but each object has one if there are enough."""
    torch.manual_seed(0)
    predictions = Predictions(torch.randn(3, 8, 2), torch.rand(3, 8, 4) * 0.5 + 0.2)
    targets = [
        Target(torch.zeros(n, dtype=torch.int64), torch.rand(n, 4) * 0.5 + 0.2) for n in (7, 2, 0)
    ]
    matches = MixedMatcher(match_number=3)(predictions, targets)
    assert [len(queries) for queries, _, _ in matches] == [7, 4, 0]
    assert matches[0][2].eq(1).all()
    # Of two queries of an object, one has the full weight.
    assert matches[1][2].eq(1).sum() == 2


def test_the_high_order_cost_counts_from_its_iteration_on():
    case = Case("rank_detr_1")
    matcher = HighOrderMatcher(start_iter=10, giou_eps=1e-6)
    inputs = [part[0] for part in case.predictions()], case.targets[0]
    for iteration, expected in ((9, HungarianMatcher(giou_eps=1e-6)), (10, HighOrderMatcher())):
        with EventStorage(iteration):
            assert matcher.cost(*inputs[0], inputs[1]).allclose(
                expected.cost(*inputs[0], inputs[1]), atol=1e-3
            )


RECIPES = {
    "align": L(CriteriaByOutput)(
        layers=L(SetCriterion)(matcher=L(MixedMatcher)(), class_loss=L(IoUAwareLoss)()),
        last=L(SetCriterion)(matcher=L(HungarianMatcher)(), class_loss=L(IoUAwareLoss)()),
    ),
    "stable": L(SetCriterion)(
        matcher=L(PositionModulatedMatcher)(), class_loss=L(PositionSupervisedLoss)()
    ),
    "varifocal": L(SetCriterion)(matcher=L(HungarianMatcher)(), class_loss=L(VarifocalLoss)()),
    "deim": L(UnionCriterion)(matcher=L(HungarianMatcher)(), class_loss=L(MatchabilityLoss)()),
    "rank": L(SetCriterion)(matcher=L(HighOrderMatcher)(), class_loss=L(GIoUAwareLoss)()),
    "mixed": L(CriteriaByOutput)(
        layers=L(SetCriterion)(matcher=L(HungarianMatcher)()),
        mixed=L(OneToManyCriterion)(matcher=L(OneToManyMatcher)()),
    ),
}
EXTRA = {"deformable_detr": (), "dino": ("_dn", "_dn_0"), "h_detr": ("_one2many", "_one2many_0")}


@pytest.mark.parametrize("detector", CONFIGS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_every_detector(recipe, detector):
    """With denoising and one-to-many branches, on an image with objects and one without."""
    torch.manual_seed(0)
    config = small_config(detector, denoising=True, criterion=RECIPES[recipe])
    suffixes = ["", "_0", "_enc", *EXTRA[detector]]
    if recipe == "mixed":
        config.decoder.layer._target_ = MixedDecoderLayer
        suffixes += ["_mixed", "_mixed_0"]
    model = instantiate(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    assert_trains(model, small_inputs(3, 0), loss_names(*suffixes))
    if recipe == "mixed":
        detections = model.eval()(small_inputs(0))[0]["instances"]
        assert len(detections) > 0


def test_unlike_kinds_of_predictions_have_their_own_criterion():
    names = ("layers", "last", "proposals", "denoising", "one_to_many", "mixed")
    parts = {name: torch.nn.Identity() for name in names}
    criteria = CriteriaByOutput(**parts)
    suffixes = ("_0", "", "_enc", "_dn_0", "_one2many", "_mixed_1")
    assert [criteria.select(suffix) for suffix in suffixes] == list(parts.values())
    alone = CriteriaByOutput(parts["layers"])
    assert {alone.select(suffix) for suffix in suffixes} == {parts["layers"]}


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: SetCriterion(
                HungarianMatcher(cost_bbox=0, cost_giou=0), class_loss=VarifocalLoss()
            ),
            "VarifocalLoss rates pairs by their boxes",
        ),
        (lambda: SetCriterion(MixedMatcher()), "FocalLoss does not use the weights"),
        (lambda: UnionCriterion(MixedMatcher(), class_loss=IoUAwareLoss()), "UnionCriterion"),
        (lambda: SoftmaxCriterion(HungarianMatcher()), "use SoftmaxMatcher"),
        (lambda: MixedMatcher(match_number=0), "match_number of at least 1"),
        (lambda: OneToManyMatcher(limit=0), "limit of at least 1"),
        (lambda: mixed_detector(layer=True), "MixedDecoderLayer predicts one-to-many"),
        (lambda: mixed_detector(criterion=True), "model.criterion.mixed=null"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def mixed_detector(layer=False, criterion=False):
    config = small_config("dino")
    if layer:
        config.decoder.layer._target_ = MixedDecoderLayer
    if criterion:
        config.criterion = RECIPES["mixed"]
    return instantiate(config)
