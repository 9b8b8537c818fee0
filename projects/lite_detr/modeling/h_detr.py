"""H-DETR: the meta-architecture."""

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from .detector import Detector
from .heads import Predictions, by_layer
from .scales import Scales
from .targets import Target, class_agnostic


@META_ARCH_REGISTRY.register()
class HDETR(Detector):
    """H-DETR (arXiv 2207.13080): Deformable DETR with a one-to-many branch in training.

    Its queries are :class:`HybridQueries`. In training every object is matched to ``one_to_many``
    of the one-to-many queries; these and the one-to-one queries do not see each other.

    Args:
        one_to_many: ``k``, how many one-to-many queries answer for an object.
        weight_one_to_many: ``lambda``, the weight of their losses.
        **detector: see :class:`Detector`.
    """

    lazy_config = "common/models/h_detr.py"

    @configurable
    def __init__(self, *, one_to_many: int = 6, weight_one_to_many: float = 1.0, **detector):
        super().__init__(**detector)
        self.one_to_many = one_to_many
        self.weight_one_to_many = weight_one_to_many

    def losses(
        self, memory: Tensor, scales: Scales, targets: list[Target], num_objects: Tensor
    ) -> dict[str, Tensor]:
        """``loss_ce``, ``loss_bbox``, ``loss_giou``; ``_0`` ... of earlier layers, ``_enc``, and
        ``_one2many``, ``_one2many_0`` ... of the one-to-many queries."""
        queries, proposals = self.queries(memory, scales)
        split = self.queries.num_queries
        is_one_to_many = torch.arange(queries.content.shape[1], device=memory.device) >= split
        attn_mask = is_one_to_many[:, None] != is_one_to_many
        layers = self.decoder(queries, memory, scales, attn_mask)
        one_to_one = [Predictions(logits[:, :split], boxes[:, :split]) for logits, boxes in layers]
        one_to_many = [Predictions(logits[:, split:], boxes[:, split:]) for logits, boxes in layers]

        repeated = [
            Target(target.labels.repeat(self.one_to_many), target.boxes.repeat(self.one_to_many, 1))
            for target in targets
        ]
        extra = self.criterion(
            by_layer(one_to_many, "_one2many"), repeated, num_objects * self.one_to_many
        )
        return (
            self.criterion(by_layer(one_to_one), targets, num_objects)
            | self.criterion({"_enc": proposals}, class_agnostic(targets), num_objects)
            | {name: self.weight_one_to_many * loss for name, loss in extra.items()}
        )
