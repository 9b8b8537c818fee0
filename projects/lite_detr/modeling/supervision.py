"""Criteria that train several kinds of predictions in different ways."""

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from ..errors import ConfigError
from .criterion import (
    ClassLoss,
    HungarianMatcher,
    Matches,
    Pairs,
    SetCriterion,
    Target,
    share_of_batch,
)
from .decoder import DeformableDecoder
from .heads import Predictions
from .matching import OneToManyMatcher


class CriteriaByOutput(nn.Module):
    """A criterion for each kind of predictions.

    Args:
        layers: for the decoder's layers, and for each kind without a criterion of its own.
        last: for the last decoder layer.
        proposals: for the encoder's proposals.
        denoising: for denoising queries, whose pairs are known.
        one_to_many: for the further queries of H-DETR.
        mixed: for what a :class:`MixedDecoderLayer` predicts one-to-many.
    """

    def __init__(
        self,
        layers: SetCriterion,
        last: SetCriterion | None = None,
        proposals: SetCriterion | None = None,
        denoising: SetCriterion | None = None,
        one_to_many: SetCriterion | None = None,
        mixed: "OneToManyCriterion | None" = None,
    ):
        super().__init__()
        self.layers = layers
        self.last = last
        self.proposals = proposals
        self.denoising = denoising
        self.one_to_many = one_to_many
        self.mixed = mixed

    @property
    def trains_mixed(self) -> bool:
        """See :class:`SetCriterion`."""
        return self.mixed is not None

    def forward(
        self,
        outputs: Mapping[str, Predictions],
        targets: list[Target],
        num_objects: Tensor,
        matches: Matches | None = None,
    ) -> dict[str, Tensor]:
        """See :meth:`SetCriterion.forward`."""
        groups: dict[SetCriterion, dict[str, Predictions]] = {}
        for suffix, predictions in outputs.items():
            groups.setdefault(self.select(suffix), {})[suffix] = predictions
        losses = {}
        for criterion, group in groups.items():
            losses |= criterion(group, targets, num_objects, matches)
        return losses

    def select(self, suffix: str) -> SetCriterion:
        """Return the criterion for the predictions with a suffix."""
        kinds = {
            "_enc": self.proposals,
            "_dn": self.denoising,
            "_one2many": self.one_to_many,
            "_mixed": self.mixed,
        }
        if suffix == "":
            own = self.last
        else:
            own = next((own for start, own in kinds.items() if suffix.startswith(start)), None)
        return self.layers if own is None else own


class UnionCriterion(SetCriterion):
    """DEIM's criterion (arXiv 2412.04234): boxes are trained on the pairs of all layers.

    Class losses are those of a layer's own pairs. Box losses are a mean over the union of the pairs
    of all predictions of a call, in which each query goes to the object that most of them name. Of
    several parts of a batch, each counts by its share of the objects.

    The arguments are those of :class:`SetCriterion`.

    Raises:
        ConfigError: the matcher weighs pairs, which a union cannot follow.
    """

    def __init__(
        self,
        matcher: HungarianMatcher,
        weight_class: float = 2.0,
        weight_bbox: float = 5.0,
        weight_giou: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        giou_eps: float = 0.0,
        class_loss: ClassLoss | None = None,
    ):
        super().__init__(
            matcher, weight_class, weight_bbox, weight_giou, alpha, gamma, giou_eps, class_loss
        )
        if matcher.weighs_pairs:
            raise ConfigError(
                f"UnionCriterion cannot follow the weights that {type(matcher).__name__} gives to "
                "pairs: use HungarianMatcher with it, or SetCriterion"
            )

    def forward(
        self,
        outputs: Mapping[str, Predictions],
        targets: list[Target],
        num_objects: Tensor,
        matches: Matches | None = None,
    ) -> dict[str, Tensor]:
        """See :meth:`SetCriterion.forward`; known matches are used as they are."""
        if matches is not None:
            return super().forward(outputs, targets, num_objects, matches)
        found = {name: self.matcher(predictions, targets) for name, predictions in outputs.items()}
        union = unite(found.values())
        per_process = num_objects.clamp(min=1) / comm.get_world_size()
        losses = {}
        for suffix, predictions in outputs.items():
            own = Pairs.gather(predictions, targets, found[suffix], self.giou_eps)
            united = Pairs.gather(predictions, targets, union, self.giou_eps)
            # A mean over the union, in the units of the class loss.
            weight = per_process * share_of_batch(targets, per_process) / max(len(united.query), 1)
            united = united._replace(weight=united.weight * weight)
            parts = self.losses_of_pairs(predictions.logits, own, united, per_process)
            losses |= {name + suffix: self.weights[name] * loss for name, loss in parts.items()}
        return losses


def unite(layers: Iterable[Matches]) -> Matches:
    """Return the union of several matches of a batch, each query once, by rising query.

    A query goes to the object that most matches name, of several to the first one named.
    """
    united = []
    for images in zip(*layers):
        votes: dict[int, Counter[int]] = {}
        for queries, objects in images:
            for query, obj in zip(queries.tolist(), objects.tolist()):
                votes.setdefault(query, Counter())[obj] += 1
        pairs = sorted((query, count.most_common(1)[0][0]) for query, count in votes.items())
        united.append(tuple(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)))
    return united


class OneToManyCriterion(SetCriterion):
    """MS-DETR's losses of one-to-many predictions (arXiv 2401.03989).

    A query in several pairs has a box loss for each, and the class of the pair that fits best. All
    are divided by the number of objects, not of pairs.

    Args:
        matcher: see :class:`OneToManyMatcher`.
        **losses: see :class:`SetCriterion`.
    """

    trains_mixed = True

    def __init__(self, matcher: OneToManyMatcher, **losses: float | ClassLoss | None):
        super().__init__(matcher, **losses)

    def losses(
        self,
        predictions: Predictions,
        targets: list[Target],
        matches: Matches,
        num_objects: Tensor,
    ) -> dict[str, Tensor]:
        """Return the losses of one set of matched predictions before weighting."""
        last = [dict(zip(queries.tolist(), objects.tolist())) for queries, objects in matches]
        unique = [
            (
                torch.tensor(list(pairs), dtype=torch.int64),
                torch.tensor(list(pairs.values()), dtype=torch.int64),
            )
            for pairs in last
        ]
        class_pairs = Pairs.gather(predictions, targets, unique, self.giou_eps)
        box_pairs = Pairs.gather(predictions, targets, matches, self.giou_eps)
        return self.losses_of_pairs(predictions.logits, class_pairs, box_pairs, num_objects)


def check_mixed(decoder: DeformableDecoder, criterion: SetCriterion | CriteriaByOutput) -> None:
    """Raise a ConfigError if one-to-many predictions have no criterion, or a criterion has none."""
    if decoder.is_mixed and not criterion.trains_mixed:
        raise ConfigError(
            "the decoder's MixedDecoderLayer predicts one-to-many, which "
            f"{type(criterion).__name__} does not train: give model.criterion as CriteriaByOutput "
            "with mixed, as lite_dino_r50_h3l1_2p1x3_mixed_12ep.py does, or use DecoderLayer"
        )
    if criterion.trains_mixed and not decoder.is_mixed:
        raise ConfigError(
            "the criterion's mixed trains one-to-many predictions, and the decoder has none: use "
            "MixedDecoderLayer as model.decoder.layer, or set model.criterion.mixed=null"
        )
