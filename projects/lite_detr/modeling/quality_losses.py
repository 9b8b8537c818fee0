"""Classification losses whose targets tell how well a box fits its object.

Each takes the place of the focal loss as ``model.criterion.class_loss``. All are sums over queries
and classes; where a logit is not that of a matched pair, its target is 0.
"""

import torch.nn.functional as F
from torch import Tensor

from .criterion import ClassLoss, Pairs


class VarifocalLoss(ClassLoss):
    """RT-DETR's loss (arXiv 2304.08069, after VarifocalNet's): the IoU is target and weight.

    Args:
        alpha: the weight of unmatched logits.
        gamma: the exponent by which easy unmatched logits count less.
    """

    def __init__(self, alpha: float = 0.75, gamma: float = 2.0):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """See :meth:`ClassLoss.forward`."""
        quality = pairs.iou.detach()
        matched = quality * binary_cross_entropy(logits[pairs.channel], quality)
        weight = self.alpha * logits.detach().sigmoid() ** self.gamma
        return sum_terms(weight * F.softplus(logits), matched, pairs)


class MatchabilityLoss(ClassLoss):
    """DEIM's matchability-aware loss (MAL, arXiv 2412.04234): the target is a power of the IoU.

    Unlike in :class:`VarifocalLoss`, pairs that fit badly count as much as others.

    Args:
        gamma: the exponent of the IoU, and that of easy unmatched logits.
        alpha: the weight of unmatched logits.
    """

    def __init__(self, gamma: float = 1.5, alpha: float = 1.0):
        super().__init__()
        self.gamma = gamma
        self.alpha = alpha

    def forward(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """See :meth:`ClassLoss.forward`."""
        matched = binary_cross_entropy(logits[pairs.channel], pairs.iou.detach() ** self.gamma)
        weight = self.alpha * logits.detach().sigmoid() ** self.gamma
        return sum_terms(weight * F.softplus(logits), matched, pairs)


class IoUAwareLoss(ClassLoss):
    """Align-DETR's IA-BCE (arXiv 2304.07527): the target mixes probability and IoU.

    With :class:`MixedMatcher` the targets of an object's further queries are lower.

    Args:
        alpha: the exponent of the probability in the target; ``1 - alpha`` is that of the IoU.
        gamma: the exponent by which easy unmatched logits count less.
    """

    uses_weights = True

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """See :meth:`ClassLoss.forward`."""
        own = logits[pairs.channel]
        quality = joint_quality(own.detach().sigmoid(), pairs.iou.detach(), self.alpha)
        matched = binary_cross_entropy(own, quality * pairs.weight)
        return sum_terms(logits.sigmoid() ** self.gamma * F.softplus(logits), matched, pairs)


class PositionSupervisedLoss(ClassLoss):
    """Stable-DINO's loss (arXiv 2304.04742): targets rank an image's pairs by their fit alone.

    The best pair of an image has the target 1.

    Args:
        alpha: the weight of matched logits; others have ``1 - alpha``.
        gamma: the exponent by which easy logits count less.
        probability_power, iou_power: the target is the product of these powers, divided by the
            largest of the image.
    """

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2.0,
        probability_power: float = 0.0,
        iou_power: float = 2.0,
    ):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma
        self.probability_power = probability_power
        self.iou_power = iou_power

    def forward(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """See :meth:`ClassLoss.forward`."""
        eps = 1e-8
        own = logits[pairs.channel]
        quality = own.detach().sigmoid() ** self.probability_power
        quality = quality * pairs.iou.detach() ** self.iou_power
        largest = quality.new_zeros(len(logits)).scatter_reduce(0, pairs.image, quality, "amax")
        quality = quality / (largest + eps).where(largest < 1, 1.0)[pairs.image]

        probability = logits.sigmoid()
        unmatched = probability**self.gamma * -(1 - probability + eps).log()
        probability = own.sigmoid()
        entropy = -quality * F.logsigmoid(own) - (1 - quality) * (1 - probability + eps).log()
        matched = (quality - probability).abs() ** self.gamma * entropy
        return sum_terms((1 - self.alpha) * unmatched, self.alpha * matched, pairs)


class GIoUAwareLoss(ClassLoss):
    """Rank-DETR's loss (arXiv 2310.08854): the target is the generalised IoU, scaled to 0 to 1.

    Args:
        alpha: the weight of matched logits; others have ``1 - alpha``.
        gamma: the exponent by which easy logits count less.
    """

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """See :meth:`ClassLoss.forward`."""
        own = logits[pairs.channel]
        quality = (pairs.giou.detach() + 1) / 2
        matched = (quality - own.sigmoid()).abs() ** self.gamma
        matched = self.alpha * matched * binary_cross_entropy(own, quality)
        unmatched = logits.sigmoid() ** self.gamma * F.softplus(logits)
        return sum_terms((1 - self.alpha) * unmatched, matched, pairs)


def joint_quality(probability: Tensor, iou: Tensor, alpha: float) -> Tensor:
    """Return Align-DETR's quality of pairs, ``probability^alpha * iou^(1 - alpha)``, of any shape.

    It is at least 0.01, so that pairs without overlap are learned also.
    """
    return (probability**alpha * iou ** (1 - alpha)).clamp(min=0.01)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each logit."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def sum_terms(unmatched: Tensor, matched: Tensor, pairs: Pairs) -> Tensor:
    """Sum the terms of all logits.

    Args:
        unmatched: ``[B, Q, C]``, the terms of logits without an object.
        matched: ``[K]``, the terms that take the pairs' places.
        pairs: no two have the same place.
    """
    return unmatched.index_put(pairs.channel, matched).sum()
