"""Training: ground truth, the matching of queries to objects, and the losses."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import Tensor, nn
from torchvision.ops import box_convert, sigmoid_focal_loss

from ..errors import ConfigError
from .heads import Predictions
from .inputs import get_instances

# For each image the matched queries and their objects, int64 on the host; a matcher that weighs
# pairs adds their weights.
Matches = list[tuple[Tensor, ...]]


class Target(NamedTuple):
    """The objects of one image.

    Attributes:
        labels: ``[N]`` int64, contiguous class indices.
        boxes: ``[N, 4]``, normalised (cx, cy, w, h).
    """

    labels: Tensor
    boxes: Tensor

    @classmethod
    def from_instances(cls, instances: Instances, dtype: torch.dtype) -> "Target":
        """Convert Detectron2's ``gt_classes`` and ``gt_boxes`` (absolute x0, y0, x1, y1)."""
        height, width = instances.image_size
        boxes = instances.gt_boxes.tensor.to(dtype)
        boxes = boxes / boxes.new_tensor([width, height, width, height])
        return cls(instances.gt_classes, box_convert(boxes, "xyxy", "cxcywh"))


def class_agnostic(targets: list[Target]) -> list[Target]:
    """Return the same objects, all of the first class.

    Proposals that only separate objects from background are trained on these.
    """
    return [target._replace(labels=target.labels * 0) for target in targets]


class HungarianMatcher(nn.Module):
    """Assign queries to objects one to one at the least total cost (DETR, section 3.1).

    The cost of a pair is a weighted sum of the focal classification cost (Deformable DETR's), the
    L1 distance of the boxes and their negative generalised IoU.

    Args:
        cost_class, cost_bbox, cost_giou: the weights of the three terms.
        alpha, gamma: parameters of the focal loss.
        giou_eps: see :func:`overlaps`.
        log_eps: added to probabilities before their logarithms are taken; MMDetection uses 1e-12.
    """

    def __init__(
        self,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        giou_eps: float = 0.0,
        log_eps: float = 1e-8,
    ):
        super().__init__()
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.alpha = alpha
        self.gamma = gamma
        self.giou_eps = giou_eps
        self.log_eps = log_eps

    # True if a matcher also weighs the pairs; the class loss must then use the weights.
    weighs_pairs = False

    @property
    def sees_boxes(self) -> bool:
        """True if the cost of a pair depends on its boxes."""
        return self.cost_bbox != 0 or self.cost_giou != 0

    @torch.no_grad()
    def forward(self, predictions: Predictions, targets: list[Target]) -> Matches:
        """Return, for each image, the matched queries and their objects: int64 on the host.

        Both lists have ``min(Q, N)`` entries, where ``N`` is the number of objects in the image. A
        query whose prediction is not finite is matched first, so that its loss is not finite
        either and names what went wrong.
        """
        return [solve(cost) for cost in self.costs(predictions, targets)]

    def costs(self, predictions: Predictions, targets: list[Target]) -> list[Tensor]:
        """Return the cost ``[Q, N]`` of every pair, image by image."""
        return [
            self.cost(logits, boxes, target)
            for logits, boxes, target in zip(predictions.logits, predictions.boxes, targets)
        ]

    def cost(self, logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
        """Return the cost ``[Q, N]`` of every pair in one image."""
        classification = self.class_cost(logits.sigmoid()[:, target.labels])
        distance = torch.cdist(boxes, target.boxes, p=1)
        giou = generalized_iou(boxes[:, None], target.boxes, self.giou_eps)
        return self.cost_class * classification + self.cost_bbox * distance - self.cost_giou * giou

    def class_cost(self, probability: Tensor) -> Tensor:
        """Return the focal classification cost of probabilities, of the same shape."""
        negative_log = -(1 - probability + self.log_eps).log()
        positive_log = -(probability + self.log_eps).log()
        negative = (1 - self.alpha) * probability**self.gamma * negative_log
        positive = self.alpha * (1 - probability) ** self.gamma * positive_log
        return positive - negative


def solve(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of the cheapest assignment of a cost ``[Q, N]``, on the host."""
    # Imported here, as it takes 0.2 s and only training needs it.
    from scipy.optimize import linear_sum_assignment

    # Less than any cost of finite predictions.
    cost = cost.nan_to_num(nan=-1e9, posinf=-1e9, neginf=-1e9).cpu().numpy()
    rows, columns = linear_sum_assignment(cost)
    return torch.from_numpy(rows), torch.from_numpy(columns)


class Pairs(NamedTuple):
    """The matched pairs of a batch.

    Attributes:
        image, query: ``[K]`` int64, where the predictions of the pairs are in the batch.
        labels: ``[K]`` int64, the classes of the objects.
        boxes, target_boxes: ``[K, 4]``, predicted and true.
        iou, giou: ``[K]``, of these boxes, with gradients.
        weight: ``[K]``, 1 unless the matcher weighs pairs.
    """

    image: Tensor
    query: Tensor
    labels: Tensor
    boxes: Tensor
    target_boxes: Tensor
    iou: Tensor
    giou: Tensor
    weight: Tensor

    @classmethod
    def gather(
        cls,
        predictions: Predictions,
        targets: list[Target],
        matches: Matches,
        giou_eps: float = 0.0,
    ) -> "Pairs":
        """Gather what the matches name from predictions and targets."""
        device = predictions.boxes.device
        image = torch.cat([torch.full_like(m[0], i) for i, m in enumerate(matches)]).to(device)
        query = torch.cat([match[0] for match in matches]).to(device)
        objects = [match[1].to(device) for match in matches]
        target_boxes = torch.cat([t.boxes[o] for t, o in zip(targets, objects)])
        boxes = predictions.boxes[image, query]
        return cls(
            image,
            query,
            torch.cat([t.labels[o] for t, o in zip(targets, objects)]),
            boxes,
            target_boxes,
            *overlaps(boxes, target_boxes, giou_eps),
            torch.cat([m[2] if len(m) > 2 else torch.ones(len(m[0])) for m in matches]).to(boxes),
        )

    @property
    def channel(self) -> tuple[Tensor, Tensor, Tensor]:
        """The indices of the pairs' own logits in ``[B, Q, C]``."""
        return self.image, self.query, self.labels


class ClassLoss(nn.Module):
    """Base of the classification losses.

    Attributes:
        needs_boxes: True if targets depend on how well boxes fit, which the matcher must then see.
        uses_weights: True if the loss follows the weights of the pairs.
    """

    needs_boxes = True
    uses_weights = False

    def forward(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Return the loss of ``logits [B, Q, C]``, a sum over queries and classes."""
        raise NotImplementedError(f"{type(self).__name__} must define `forward`")


class FocalLoss(ClassLoss):
    """The focal loss (arXiv 1708.02002).

    Args:
        alpha: the weight of matched logits; others have ``1 - alpha``.
        gamma: the exponent by which easy logits count less.
    """

    needs_boxes = False

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, logits: Tensor, pairs: Pairs) -> Tensor:
        one_hot = torch.zeros_like(logits)
        one_hot[pairs.channel] = 1.0
        return sigmoid_focal_loss(
            logits, one_hot, alpha=self.alpha, gamma=self.gamma, reduction="sum"
        )


class SetCriterion(nn.Module):
    """Class, L1 and generalised IoU losses after matching (DETR, section 3.1).

    Every loss is a sum over queries, divided by the number of objects in all processes (at least
    one) and multiplied by the number of processes. As gradients are averaged over processes, they
    do not depend on how a batch is split among them.

    Args:
        matcher: assigns queries to objects, for each set of predictions separately.
        weight_class, weight_bbox, weight_giou: the weights of the three losses.
        alpha, gamma: parameters of the focal loss.
        giou_eps: see :func:`overlaps`.
        class_loss: a loss in place of the focal one, see ``quality_losses.py``.

    Raises:
        ConfigError: the class loss and the matcher do not go together.
    """

    # True if the criterion trains the second predictions of a MixedDecoderLayer.
    trains_mixed = False

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
        super().__init__()
        self.matcher = matcher
        self.class_loss = FocalLoss(alpha, gamma) if class_loss is None else class_loss
        check_parts(matcher, self.class_loss)
        self.weights = {
            "loss_ce": weight_class,
            "loss_bbox": weight_bbox,
            "loss_giou": weight_giou,
        }
        self.giou_eps = giou_eps

    @property
    def weight_class(self) -> float:
        return self.weights["loss_ce"]

    def forward(
        self,
        outputs: Mapping[str, Predictions],
        targets: list[Target],
        num_objects: Tensor,
        matches: Matches | None = None,
    ) -> dict[str, Tensor]:
        """Return the weighted losses of several sets of predictions for the same targets.

        Args:
            outputs: predictions by the suffix of their losses' names, such as ``{"": last,
                "_0": first_layer, "_enc": proposals}``.
            targets: the objects of each image.
            num_objects: the number of objects in all processes, a scalar; see
                :func:`count_objects`.
            matches: the indices of queries and of their objects for each image, if known
                beforehand; None lets the matcher find them for each set of predictions.

        Returns:
            ``loss_ce``, ``loss_bbox`` and ``loss_giou``, each with every suffix; their sum is to be
            minimised.
        """
        per_process = num_objects.clamp(min=1) / comm.get_world_size()
        losses = {}
        for suffix, predictions in outputs.items():
            found = matches if matches is not None else self.matcher(predictions, targets)
            for name, loss in self.losses(predictions, targets, found, per_process).items():
                losses[name + suffix] = self.weights[name] * loss
        return losses

    def losses(
        self,
        predictions: Predictions,
        targets: list[Target],
        matches: Matches,
        num_objects: Tensor,
    ) -> dict[str, Tensor]:
        """Return the losses of one set of matched predictions before weighting."""
        pairs = Pairs.gather(predictions, targets, matches, self.giou_eps)
        return self.losses_of_pairs(predictions.logits, pairs, pairs, num_objects)

    def losses_of_pairs(
        self, logits: Tensor, class_pairs: Pairs, box_pairs: Pairs, num_objects: Tensor
    ) -> dict[str, Tensor]:
        """Return the class loss on some pairs and the box losses on others."""
        distance = (box_pairs.boxes - box_pairs.target_boxes).abs().sum(-1)
        return {
            "loss_ce": self.class_loss(logits, class_pairs) / num_objects,
            "loss_bbox": (box_pairs.weight * distance).sum() / num_objects,
            "loss_giou": (box_pairs.weight * (1 - box_pairs.giou)).sum() / num_objects,
        }


def check_parts(matcher: HungarianMatcher, class_loss: ClassLoss) -> None:
    """Raise a ConfigError if a class loss and a matcher do not go together."""
    loss, name = type(class_loss).__name__, type(matcher).__name__
    if class_loss.needs_boxes and not matcher.sees_boxes:
        raise ConfigError(
            f"{loss} rates pairs by their boxes, which {name} does not compare: set its cost_bbox "
            "or cost_giou above 0, or use FocalLoss"
        )
    if matcher.weighs_pairs and not class_loss.uses_weights:
        raise ConfigError(
            f"{name} weighs pairs, and {loss} does not use the weights: use IoUAwareLoss with it, "
            "or HungarianMatcher"
        )


def count_objects(batched_inputs: list[dict], device: torch.device) -> Tensor:
    """Return the number of objects of a batch in all processes, a scalar.

    All processes must call this.

    Args:
        batched_inputs: this process's part of the batch, Detectron2's dicts with ``instances``.
        device: the model's device.

    Raises:
        ValueError: an image has no ``instances``.
    """
    count = torch.tensor(
        float(sum(len(get_instances(inputs)) for inputs in batched_inputs)), device=device
    )
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(count)
    return count


def share_of_batch(targets: list[Target], num_objects: Tensor) -> Tensor:
    """Return the weight of a mean over a part of a batch, by its objects; 1 for a whole batch.

    Args:
        targets: the objects of the part's images.
        num_objects: the number that losses of this process are divided by, at least 1.
    """
    return max(sum(len(target.labels) for target in targets), 1) / num_objects


def generalized_iou(boxes: Tensor, others: Tensor, eps: float = 0.0) -> Tensor:
    """Return the generalised IoU of boxes, from -1 to 1; see :func:`overlaps`."""
    return overlaps(boxes, others, eps)[1]


def overlaps(boxes: Tensor, others: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the IoU of boxes and their generalised IoU (arXiv 1902.09630, algorithm 1).

    Args:
        boxes: ``[..., 4]`` as (cx, cy, w, h).
        others: ``[..., 4]``, broadcast against ``boxes``: ``[N, 4]`` and ``[N, 4]`` are pairs,
            ``[Q, 1, 4]`` and ``[N, 4]`` make a matrix.
        eps: added to both denominators, the union and the enclosing area. Deformable DETR and
            H-DETR use 0, DINO and all of detrex 1e-6.

    Returns:
        Both ``[...]``, from 0 to 1 and from -1 to 1.
    """
    low, high = box_convert(boxes, "cxcywh", "xyxy").split(2, dim=-1)
    other_low, other_high = box_convert(others, "cxcywh", "xyxy").split(2, dim=-1)
    overlap = _area((torch.min(high, other_high) - torch.max(low, other_low)).clamp(min=0))
    enclosing = _area(torch.max(high, other_high) - torch.min(low, other_low))
    union = _area(high - low) + _area(other_high - other_low) - overlap
    iou = overlap / (union + eps)
    return iou, iou - (enclosing - union) / (enclosing + eps)


def _area(size: Tensor) -> Tensor:
    width, height = size.unbind(-1)
    return width * height
