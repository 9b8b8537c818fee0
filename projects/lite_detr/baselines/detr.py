"""DETR: the meta-architecture, its queries, heads, matching and losses."""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ..errors import ConfigError
from ..modeling.criterion import (
    HungarianMatcher,
    Matches,
    SetCriterion,
    Target,
    generalized_iou,
    share_of_batch,
)
from ..modeling.heads import PredictionHeads, Predictions
from ..modeling.queries import Queries
from ..modeling.scales import Scales
from .single_scale import SingleScaleDetector


@META_ARCH_REGISTRY.register()
class DETR(SingleScaleDetector):
    """DETR (arXiv 2005.12872): dense attention on one map, and a softmax over classes.

    Its logits have one channel more than there are classes: the last one means "no object". The
    arguments are those of :class:`SingleScaleDetector`.
    """

    lazy_config = "common/models/detr.py"

    @configurable
    def __init__(self, **detector):
        super().__init__(**detector)

    def independent_classes(self, predictions: Predictions) -> Predictions:
        """Keep the best class of each query, with the logit of its share in the softmax."""
        shares = predictions.logits.softmax(-1)[..., :-1]
        best = shares == shares.amax(-1, keepdim=True)
        logits = shares.logit().masked_fill(~best, float("-inf"))
        return predictions._replace(logits=logits)


class PositionQueries(nn.Module):
    """DETR's queries: learned positions, with zeros for content (section 3.2).

    Boxes do not start from anything, which is the same as starting at the centre of ``[0, 1]``.

    Args:
        embed_dim: channels ``C``.
        num_queries: ``Q``
    """

    def __init__(self, embed_dim: int = 256, num_queries: int = 100):
        super().__init__()
        self.pos = nn.Embedding(num_queries, embed_dim)

    def forward(self, memory: Tensor, scales: Scales) -> tuple[Queries, None]:
        """Return the queries, and no proposals; of ``memory [B, S, C]`` only ``B`` matters."""
        pos = self.pos.weight.expand(memory.shape[0], -1, -1)
        reference = scales.centers.new_full((*pos.shape[:2], 2), 0.5)
        return Queries(torch.zeros_like(pos), pos, reference), None


class NoObjectHeads(PredictionHeads):
    """Heads with a channel for "no object", which start as PyTorch's layers do.

    Args:
        embed_dim: channels ``C`` of the queries.
        num_classes: foreground classes, without "no object".
        num_layers: the number of decoder layers, which share one pair of heads.
    """

    def __init__(self, embed_dim: int, num_classes: int, num_layers: int):
        super().__init__(embed_dim, num_classes + 1, num_layers, shared=True)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()


class SoftmaxMatcher(HungarianMatcher):
    """The matcher whose class cost is the negative probability (DETR, section 3.1).

    Args:
        cost_class, cost_bbox, cost_giou: the weights of the three terms.
    """

    def __init__(self, cost_class: float = 1.0, cost_bbox: float = 5.0, cost_giou: float = 2.0):
        super().__init__(cost_class, cost_bbox, cost_giou)

    def cost(self, logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
        """Return the cost ``[Q, N]`` of every pair in one image."""
        probability = logits.softmax(-1)[:, target.labels]
        distance = torch.cdist(boxes, target.boxes, p=1)
        giou = generalized_iou(boxes[:, None], target.boxes)
        return self.cost_bbox * distance - self.cost_class * probability - self.cost_giou * giou


class SoftmaxCriterion(SetCriterion):
    """The criterion with a cross entropy over all classes and "no object" (DETR, section 3.1).

    The cross entropy is a weighted mean over queries. Of several parts of a batch, each counts by
    its share of the objects.

    Args:
        matcher: see :class:`SetCriterion`.
        weight_class, weight_bbox, weight_giou: the weights of the three losses.
        weight_no_object: the weight of queries without an object in the cross entropy.

    Raises:
        ConfigError: the matcher's class cost is not that of a softmax.
    """

    def __init__(
        self,
        matcher: SoftmaxMatcher,
        weight_class: float = 1.0,
        weight_bbox: float = 5.0,
        weight_giou: float = 2.0,
        weight_no_object: float = 0.1,
    ):
        super().__init__(matcher, weight_class, weight_bbox, weight_giou)
        if not isinstance(matcher, SoftmaxMatcher):
            raise ConfigError(
                "SoftmaxCriterion trains one class or none for each query, which "
                f"{type(matcher).__name__} does not match: use SoftmaxMatcher"
            )
        self.weight_no_object = weight_no_object

    def losses(
        self,
        predictions: Predictions,
        targets: list[Target],
        matches: Matches,
        num_objects: Tensor,
    ) -> dict[str, Tensor]:
        """Return the losses of one set of matched predictions before weighting."""
        logits = predictions.logits
        no_object = logits.shape[-1] - 1
        classes = torch.full(logits.shape[:2], no_object, device=logits.device)
        for image, (queries, objects) in enumerate(matches):
            classes[image, queries.to(logits.device)] = targets[image].labels[
                objects.to(logits.device)
            ]
        weight = logits.new_ones(logits.shape[-1])
        weight[no_object] = self.weight_no_object
        mean = F.cross_entropy(logits.transpose(1, 2), classes, weight)
        losses = super().losses(predictions, targets, matches, num_objects)
        return losses | {"loss_ce": mean * share_of_batch(targets, num_objects)}
