"""Matchers of newer recipes, each in place of the Hungarian one: ``model.criterion.matcher``."""

import torch
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor

from ..errors import ConfigError
from .criterion import HungarianMatcher, Matches, Target, overlaps, solve
from .heads import Predictions
from .quality_losses import joint_quality


class MixedMatcher(HungarianMatcher):
    """Align-DETR's mixed matching (arXiv 2304.07527): several queries for each object.

    The weights of an object's pairs fall with their rank by quality, see :func:`joint_quality`. An
    image with many objects gets fewer queries for each, so that they take at most half of all. The
    released code keeps such a lower number for the rest of the batch; this one does not.

    Args:
        match_number: the number of queries for each object.
        decay: ``tau``; the pair of rank ``r`` = 0, 1, ... has the weight ``exp(-r / tau)``.
        quality_alpha: ``alpha`` of :func:`joint_quality`.
        **costs: see :class:`HungarianMatcher`.

    Raises:
        ConfigError: ``match_number`` or ``decay`` is out of its range.
    """

    weighs_pairs = True

    def __init__(
        self, match_number: int = 2, decay: float = 1.5, quality_alpha: float = 0.25, **costs: float
    ):
        super().__init__(**costs)
        if match_number < 1 or decay <= 0:
            raise ConfigError(
                "MixedMatcher needs a match_number of at least 1 and a decay above 0, got "
                f"{match_number} and {decay}"
            )
        self.match_number = match_number
        self.decay = decay
        self.quality_alpha = quality_alpha

    @torch.no_grad()
    def forward(self, predictions: Predictions, targets: list[Target]) -> Matches:
        """Return the queries, objects and weights of each image, sorted by object."""
        costs = self.costs(predictions, targets)
        return [
            self._match(cost, logits, boxes, target)
            for cost, logits, boxes, target in zip(costs, *predictions, targets)
        ]

    def _match(
        self, cost: Tensor, logits: Tensor, boxes: Tensor, target: Target
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_queries, num_objects = cost.shape
        repeats = max(min(self.match_number, num_queries // (2 * max(num_objects, 1))), 1)
        queries, objects = solve(cost.repeat(1, repeats))
        objects = objects % max(num_objects, 1)
        order = objects.argsort(stable=True)
        queries, objects = queries[order], objects[order]

        row, column = queries.to(cost.device), objects.to(cost.device)
        probability = logits[row, target.labels[column]].sigmoid()
        iou, _ = overlaps(boxes[row], target.boxes[column], self.giou_eps)
        quality = joint_quality(probability, iou, self.quality_alpha).cpu()
        rank = rank_within(objects, quality).to(quality.dtype)
        return queries, objects, torch.exp(-rank / self.decay)


def rank_within(groups: Tensor, values: Tensor) -> Tensor:
    """Return the rank of each value in its group by falling value, both ``[K]``: 0, 1, ..."""
    falling = values.argsort(descending=True, stable=True)
    position = torch.empty_like(falling)
    position[falling] = torch.arange(len(falling))
    ahead = (groups[:, None] == groups) & (position < position[:, None])
    return ahead.sum(1)


class PositionModulatedMatcher(HungarianMatcher):
    """Stable-DINO's matcher (arXiv 2304.04742): the class cost rates probability times fit.

    As in the released code, objects of one class share the fit to the last of them in the batch,
    and the best fit to any object of the batch scales those of an image.

    Args:
        fit_power: the exponent of the fit.
        **costs: see :class:`HungarianMatcher`.
    """

    def __init__(self, fit_power: float = 0.5, **costs: float):
        super().__init__(**costs)
        self.fit_power = fit_power

    def costs(self, predictions: Predictions, targets: list[Target]) -> list[Tensor]:
        """Return the cost ``[Q, N]`` of every pair, image by image."""
        labels = torch.cat([target.labels for target in targets])
        # The last object of a class is the one that its key keeps.
        last = {label: index for index, label in enumerate(labels.tolist())}
        shared = torch.cat([target.boxes for target in targets])[list(last.values())]
        column = {label: index for index, label in enumerate(last)}
        costs = []
        for logits, boxes, target in zip(*predictions, targets):
            fit = (overlaps(boxes[:, None], shared, self.giou_eps)[1] + 1) / 2
            if fit.numel() and fit.max() < 1:
                fit = fit / (fit.max() + 1e-8)
            own = fit[:, [column[label] for label in target.labels.tolist()]]
            probability = logits.sigmoid()[:, target.labels] * own**self.fit_power
            distance = torch.cdist(boxes, target.boxes, p=1)
            giou = overlaps(boxes[:, None], target.boxes, self.giou_eps)[1]
            costs.append(
                self.cost_class * self.class_cost(probability)
                + self.cost_bbox * distance
                + self.cost_giou * (1 - giou)
            )
        return costs


class HighOrderMatcher(HungarianMatcher):
    """Rank-DETR's matcher (arXiv 2310.08854), for the last part of a training run.

    There the cost is ``-probability * iou^order``, and nothing else.

    Args:
        start_iter: the iteration from which it counts; the ordinary cost does before. Outside a
            trainer, where there are no iterations, it counts if this is 0.
        order: the exponent of the IoU.
        **costs: see :class:`HungarianMatcher`.
    """

    def __init__(self, start_iter: int = 0, order: float = 4.0, **costs: float):
        super().__init__(**costs)
        self.start_iter = start_iter
        self.order = order

    def cost(self, logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
        """Return the cost ``[Q, N]`` of every pair in one image."""
        iteration = get_event_storage().iter if has_event_storage() else 0
        if iteration < self.start_iter:
            return super().cost(logits, boxes, target)
        iou, _ = overlaps(boxes[:, None], target.boxes, self.giou_eps)
        return -logits.sigmoid()[:, target.labels] * iou**self.order


class OneToManyMatcher(HungarianMatcher):
    """MS-DETR's one-to-many assignment (arXiv 2401.03989): queries that fit an object well.

    The quality of a pair is a mean of its IoU and probability. A query may fit the object to which
    its quality is highest, if that is high enough or if no query fits the object better. An object
    with ``m`` such queries takes the ``m`` best of all, up to a limit.

    Args:
        threshold: the lowest quality of a fitting query.
        limit: the largest number of queries for an object.
        iou_share: the share of the IoU in the quality; the rest is the probability's.
        positive_share: the largest share of an image's queries that fit; of more, some are drawn.

    Raises:
        ConfigError: ``limit`` is below 1.
    """

    def __init__(
        self,
        threshold: float = 0.4,
        limit: int = 6,
        iou_share: float = 0.7,
        positive_share: float = 0.25,
        giou_eps: float = 0.0,
    ):
        super().__init__(giou_eps=giou_eps)
        if limit < 1:
            raise ConfigError(f"OneToManyMatcher needs a limit of at least 1, got {limit}")
        self.threshold = threshold
        self.limit = limit
        self.iou_share = iou_share
        self.positive_share = positive_share

    def cost(self, logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
        """Return the negative quality ``[Q, N]`` of every pair in one image."""
        iou, _ = overlaps(boxes[:, None], target.boxes, self.giou_eps)
        probability = logits.sigmoid()[:, target.labels]
        return -(self.iou_share * iou + (1 - self.iou_share) * probability)

    @torch.no_grad()
    def forward(self, predictions: Predictions, targets: list[Target]) -> Matches:
        """Return the queries and objects of each image, by rising quality.

        A query may be in several pairs; the last one has its class.
        """
        return [self._match(-cost.cpu()) for cost in self.costs(predictions, targets)]

    def _match(self, quality: Tensor) -> tuple[Tensor, Tensor]:
        num_queries, num_objects = quality.shape
        if not num_objects:
            empty = torch.zeros(0, dtype=torch.int64)
            return empty, empty
        # A prediction that is not finite is taken, so that its loss is not finite either.
        quality = quality.nan_to_num(nan=1e9)
        best, owner = quality.max(1)
        fits = best >= self.threshold
        fits[quality.argmax(0)] = True
        found = fits.nonzero()[:, 0]
        allowed = int(num_queries * self.positive_share)
        if len(found) > allowed:
            found = found[torch.randperm(len(found))[:allowed]]
        counts = owner[found].bincount(minlength=num_objects).clamp(max=self.limit).tolist()
        queries = torch.cat([quality[:, k].topk(count).indices for k, count in enumerate(counts)])
        objects = torch.arange(num_objects).repeat_interleave(torch.tensor(counts))
        order = quality[queries, objects].argsort(stable=True)
        return queries[order], objects[order]
