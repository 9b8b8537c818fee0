"""The set criterion: the losses of matched and unmatched queries."""

from collections.abc import Mapping

import torch
import torch.distributed
from detectron2.utils import comm
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from .heads import Predictions
from .inputs import instances_of
from .iou import generalized_iou
from .matcher import HungarianMatcher
from .targets import Target


class SetCriterion(nn.Module):
    """Focal, L1 and generalised IoU losses after Hungarian matching (DETR, section 3.1).

    Every loss is a sum over queries divided by the number of objects of all processes, at least
    one, and times the number of processes: since gradients are averaged over processes, they do not
    depend on how a batch is spread over them.

    Args:
        matcher: assigns queries to objects, for each set of predictions on its own.
        weight_class, weight_bbox, weight_giou: the weights of the three losses.
        alpha, gamma: of the focal loss.
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
        """The weighted losses of several sets of predictions for the same targets.

        Args:
            outputs: predictions by the suffix of their losses' names, such as ``{"": last,
                "_0": first_layer, "_enc": proposals}``.
            targets: the objects of each image.
            num_objects: of all processes, a scalar; see :func:`count_objects`.
            matches: for each image the indices of queries and of their objects, where they are
                known beforehand; None lets the matcher find them for each set of predictions.

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
        """The losses of one set of matched predictions before weighting."""
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
    """The number of objects of a batch in all processes, which all have to call this: a scalar.

    Args:
        batched_inputs: Detectron2's dicts with ``instances``, of this process.
        device: the model's.

    Raises:
        ValueError: an image has no ``instances``.
    """
    count = torch.tensor(
        float(sum(len(instances_of(inputs)) for inputs in batched_inputs)), device=device
    )
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(count)
    return count
