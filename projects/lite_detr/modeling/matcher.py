"""The Hungarian matcher: which query answers for which object."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .heads import Predictions
from .iou import generalized_iou
from .targets import Target


class HungarianMatcher(nn.Module):
    """One-to-one assignment of least total cost (DETR, arXiv 2005.12872, section 3.1).

    The cost of a pair weighs the focal classification cost (Deformable DETR's), the L1 distance of
    the boxes and their negative generalised IoU.

    Args:
        cost_class, cost_bbox, cost_giou: the weights of the three parts.
        alpha, gamma: of the focal loss.
        giou_eps: see :func:`generalized_iou`.
    """

    def __init__(
        self,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        giou_eps: float = 0.0,
    ):
        super().__init__()
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.alpha = alpha
        self.gamma = gamma
        self.giou_eps = giou_eps

    @torch.no_grad()
    def forward(
        self, predictions: Predictions, targets: list[Target]
    ) -> list[tuple[Tensor, Tensor]]:
        """For each image, the indices of matched queries and of their objects, int64 on the host.

        Each list has ``min(Q, N)`` entries, where ``N`` is the number of objects of the image. A
        query whose prediction is not finite is matched before all others, so that the loss is not
        finite either, and its name tells where that began.
        """
        return [
            self._match(logits, boxes, target)
            for logits, boxes, target in zip(predictions.logits, predictions.boxes, targets)
        ]

    def cost(self, logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
        """The cost ``[Q, N]`` of every pair in one image."""
        probability = logits.sigmoid()
        eps = 1e-8
        negative = (1 - self.alpha) * probability**self.gamma * -(1 - probability + eps).log()
        positive = self.alpha * (1 - probability) ** self.gamma * -(probability + eps).log()
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
