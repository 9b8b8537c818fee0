"""H-DETR: the meta-architecture and its queries."""

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from .criterion import Target, class_agnostic
from .detector import Detector
from .heads import Predictions, by_layer
from .queries import BoxEncoding, ProposalQueries, Queries, expand_content
from .scales import Scales


@META_ARCH_REGISTRY.register()
class HDETR(Detector):
    """H-DETR (arXiv 2207.13080): Deformable DETR with a one-to-many branch in training.

    Its queries are :class:`HybridQueries`. In training, every object is matched to ``one_to_many``
    of the one-to-many queries; these and the one-to-one queries do not see each other.

    Args:
        one_to_many: ``k``, the number of one-to-many queries matched to each object.
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
        """Return ``loss_ce``, ``loss_bbox`` and ``loss_giou``.

        Those of earlier layers end in ``_0``, ``_1`` and so on, those of the proposals in ``_enc``,
        and those of the one-to-many queries in ``_one2many``, ``_one2many_0`` and so on.
        """
        queries, proposals = self.queries(memory, scales)
        split = self.queries.num_queries
        is_one_to_many = torch.arange(queries.content.shape[1], device=memory.device) >= split
        attn_mask = is_one_to_many[:, None] != is_one_to_many
        layers = self.decoder(queries, memory, scales, attn_mask)
        one_to_one = [layer.slice(0, split) for layer in layers]
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


class HybridQueries(ProposalQueries):
    """H-DETR's queries: the one-to-one ones, followed in training by the one-to-many ones.

    Content is learned; the position encodes the proposed box (H-DETR, arXiv 2207.13080, section 3).
    In inference there are only the one-to-one queries.

    Args:
        embed_dim: channels ``C``.
        num_classes: foreground classes.
        num_queries: the number of one-to-one queries.
        num_one_to_many: the number of one-to-many queries.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_classes: int = 80,
        num_queries: int = 300,
        num_one_to_many: int = 1500,
    ):
        super().__init__(embed_dim, num_classes)
        self.num_queries = num_queries
        self.num_one_to_many = num_one_to_many
        self.content = nn.Embedding(num_queries + num_one_to_many, embed_dim)
        self.encode_box = BoxEncoding(embed_dim)

    def forward(self, memory: Tensor, scales: Scales) -> tuple[Queries, Predictions]:
        """Return the queries, and the proposals for the encoder's loss."""
        wanted = self.num_queries + (self.num_one_to_many if self.training else 0)
        reference, proposals = self.propose(memory, scales, wanted)
        pos, _ = self.encode_box(reference)
        return Queries(expand_content(self.content, reference), pos, reference), proposals
