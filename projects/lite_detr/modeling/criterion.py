"""Training: ground truth, the matching of queries to objects, and the losses."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed
from detectron2.structures import Instances
from detectron2.utils import comm
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert, sigmoid_focal_loss

from .heads import Predictions
from .inputs import get_instances


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
        giou_eps: see :func:`generalized_iou`.
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

    @torch.no_grad()
    def forward(
        self, predictions: Predictions, targets: list[Target]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return, for each image, the matched queries and their objects: int64 on the host.

        Both lists have ``min(Q, N)`` entries, where ``N`` is the number of objects in the image. A
        query whose prediction is not finite is matched first, so that its loss is not finite
        either and names what went wrong.
        """
        return [
            self._match(logits, boxes, target)
            for logits, boxes, target in zip(predictions.logits, predictions.boxes, targets)
        ]

    def cost(self, logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
        """Return the cost ``[Q, N]`` of every pair in one image."""
        probability = logits.sigmoid()
        negative_log = -(1 - probability + self.log_eps).log()
        positive_log = -(probability + self.log_eps).log()
        negative = (1 - self.alpha) * probability**self.gamma * negative_log
        positive = self.alpha * (1 - probability) ** self.gamma * positive_log
        classification = (positive - negative)[:, target.labels]
        distance = torch.cdist(boxes, target.boxes, p=1)
        giou = generalized_iou(boxes[:, None], target.boxes, self.giou_eps)
        return self.cost_class * classification + self.cost_bbox * distance - self.cost_giou * giou

    def _match(self, logits: Tensor, boxes: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        cost = self.cost(logits, boxes, target)
        # Less than any cost of finite predictions.
        cost = cost.nan_to_num(nan=-1e9, posinf=-1e9, neginf=-1e9).cpu().numpy()
        queries, objects = linear_sum_assignment(cost)
        return torch.from_numpy(queries), torch.from_numpy(objects)


class SetCriterion(nn.Module):
    """Focal, L1 and generalised IoU losses after Hungarian matching (DETR, section 3.1).

    Every loss is a sum over queries, divided by the number of objects in all processes (at least
    one) and multiplied by the number of processes. As gradients are averaged over processes, they
    do not depend on how a batch is split among them.

    Args:
        matcher: assigns queries to objects, for each set of predictions separately.
        weight_class, weight_bbox, weight_giou: the weights of the three losses.
        alpha, gamma: parameters of the focal loss.
        giou_eps: see :func:`generalized_iou`.
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
    ):
        super().__init__()
        self.matcher = matcher
        self.weights = {
            "loss_ce": weight_class,
            "loss_bbox": weight_bbox,
            "loss_giou": weight_giou,
        }
        self.alpha = alpha
        self.gamma = gamma
        self.giou_eps = giou_eps

    def forward(
        self,
        outputs: Mapping[str, Predictions],
        targets: list[Target],
        num_objects: Tensor,
        matches: list[tuple[Tensor, Tensor]] | None = None,
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
        matches: list[tuple[Tensor, Tensor]],
        num_objects: Tensor,
    ) -> dict[str, Tensor]:
        """Return the losses of one set of matched predictions before weighting."""
        logits, boxes = predictions
        device = logits.device
        image = torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(matches)]).to(device)
        query = torch.cat([q for q, _ in matches]).to(device)
        labels = torch.cat([t.labels[o.to(device)] for t, (_, o) in zip(targets, matches)])
        target_boxes = torch.cat([t.boxes[o.to(device)] for t, (_, o) in zip(targets, matches)])

        one_hot = torch.zeros_like(logits)
        one_hot[image, query, labels] = 1.0
        loss_class = sigmoid_focal_loss(
            logits, one_hot, alpha=self.alpha, gamma=self.gamma, reduction="sum"
        )
        matched = boxes[image, query]
        giou = generalized_iou(matched, target_boxes, self.giou_eps)
        return {
            "loss_ce": loss_class / num_objects,
            "loss_bbox": (matched - target_boxes).abs().sum() / num_objects,
            "loss_giou": (1 - giou).sum() / num_objects,
        }


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


def generalized_iou(boxes: Tensor, others: Tensor, eps: float = 0.0) -> Tensor:
    """Return the generalised IoU of boxes (arXiv 1902.09630, algorithm 1).

    Args:
        boxes: ``[..., 4]`` as (cx, cy, w, h).
        others: ``[..., 4]``, broadcast against ``boxes``: ``[N, 4]`` and ``[N, 4]`` are pairs,
            ``[Q, 1, 4]`` and ``[N, 4]`` make a matrix.
        eps: added to both denominators, the union and the enclosing area. Deformable DETR and
            H-DETR use 0, DINO and all of detrex 1e-6.

    Returns:
        ``[...]``, from -1 to 1.
    """
    low, high = box_convert(boxes, "cxcywh", "xyxy").split(2, dim=-1)
    other_low, other_high = box_convert(others, "cxcywh", "xyxy").split(2, dim=-1)
    overlap = _area((torch.min(high, other_high) - torch.max(low, other_low)).clamp(min=0))
    enclosing = _area(torch.max(high, other_high) - torch.min(low, other_low))
    union = _area(high - low) + _area(other_high - other_low) - overlap
    return overlap / (union + eps) - (enclosing - union) / (enclosing + eps)


def _area(size: Tensor) -> Tensor:
    width, height = size.unbind(-1)
    return width * height
