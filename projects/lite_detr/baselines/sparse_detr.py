"""Sparse DETR: the meta-architectures, and queries that start from the memory."""

import math

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ..modeling.criterion import Target
from ..modeling.detector import Detector
from ..modeling.dino import DINO
from ..modeling.h_detr import HDETR
from ..modeling.heads import PredictionHeads, Predictions, by_layer
from ..modeling.layers import sine_embedding
from ..modeling.queries import (
    ProposalQueries,
    Queries,
    anchor_logits,
    gather_queries,
    static_min,
)
from ..modeling.scales import Scales
from .sparse_encoder import SparseEncoder, SparseScales, SparseTraining


class SupervisedEncoderDETR(Detector):
    """Deformable DETR whose encoder layers also predict (Sparse DETR, section 3.4).

    Proposals are trained on the classes of objects. The arguments are those of :class:`Detector`.
    """

    def __init__(self, *, encoder: SparseEncoder, embed_dim: int, num_classes: int, **detector):
        super().__init__(encoder=encoder, embed_dim=embed_dim, num_classes=num_classes, **detector)
        # The last layer's tokens make the proposals.
        self.encoder_heads = PredictionHeads(embed_dim, num_classes, len(encoder.layers) - 1)

    def losses(
        self, memory: Tensor, scales: SparseScales, targets: list[Target], num_objects: Tensor
    ) -> dict[str, Tensor]:
        """Return ``loss_ce``, ``loss_bbox`` and ``loss_giou``.

        Those of earlier layers end in ``_0``, ``_1`` and so on, those of the proposals in ``_enc``,
        and those of the encoder's layers in ``_enc_0``, ``_enc_1`` and so on.
        """
        queries, proposals = self.queries(memory, scales)
        outputs = by_layer(self.decoder(queries, memory, scales)) | {"_enc": proposals}
        anchors = gather_queries(anchor_logits(scales)[0], scales.selection.tokens)
        for layer, tokens in enumerate(scales.after[:-1]):
            logits = self.encoder_heads.classify(layer, tokens).to(anchors.dtype)
            moves = self.encoder_heads.bbox_embed[layer](tokens).to(anchors.dtype)
            outputs[f"_enc_{layer}"] = Predictions(logits, (anchors + moves).sigmoid())
        return self.criterion(outputs, targets, num_objects)


@META_ARCH_REGISTRY.register()
class SparseDETR(SparseTraining, SupervisedEncoderDETR):
    """Sparse DETR (arXiv 2111.14330), as released.

    Its encoder is a :class:`SparseEncoder`, whose scores see the features of proposals; its queries
    are :class:`MemoryQueries`. The arguments are those of :class:`Detector`.
    """

    lazy_config = "common/models/sparse_detr.py"

    @configurable
    def __init__(self, **detector):
        super().__init__(**detector)
        # The scores before the encoder and the proposals after it are made from one projection.
        self.queries.enc_output = self.encoder.scorer.enc_output
        self.queries.enc_output_norm = self.encoder.scorer.enc_output_norm


@META_ARCH_REGISTRY.register()
class SparseDINO(SparseTraining, DINO):
    """DINO with a :class:`SparseEncoder`. The arguments are those of :class:`DINO`."""


@META_ARCH_REGISTRY.register()
class SparseHDETR(SparseTraining, HDETR):
    """H-DETR with a :class:`SparseEncoder`. The arguments are those of :class:`HDETR`."""


class MemoryQueries(ProposalQueries):
    """Queries whose content is the memory at the best proposals (Efficient DETR's).

    The position encodes the proposed box. Proposals are ranked by their best class.

    Args:
        embed_dim: channels ``C``.
        num_classes: foreground classes.
        num_queries: ``Q``; an image with fewer tokens gets as many queries as it has tokens.
    """

    class_agnostic = False

    def __init__(self, embed_dim: int = 256, num_classes: int = 80, num_queries: int = 300):
        super().__init__(embed_dim, num_classes)
        self.num_queries = num_queries
        self.encode_box = BoxPosition(embed_dim)

    def forward(self, memory: Tensor, scales: Scales) -> tuple[Queries, Predictions]:
        """Return the queries, and in training the proposals of all ``S`` tokens."""
        features, anchors = self.proposal_features(memory, scales)
        logits = self.class_embed(features)
        count = static_min(self.num_queries, memory.shape[1])
        best = logits.amax(-1).topk(count, dim=1).indices
        content = gather_queries(memory, best)
        if not self.training:
            features, anchors, logits = (
                gather_queries(tokens, best) for tokens in (features, anchors, logits)
            )
        boxes = (self.bbox_embed(features).to(anchors.dtype) + anchors).sigmoid()
        reference = (gather_queries(boxes, best) if self.training else boxes).detach()
        proposals = Predictions(logits.to(boxes.dtype), boxes)
        return Queries(content, self.encode_box(reference), reference), proposals


class BoxPosition(nn.Module):
    """A linear map of the sine encoding of boxes.

    Args:
        embed_dim: channels ``C``.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        self.linear = nn.Linear(2 * embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, boxes: Tensor) -> Tensor:
        """``[B, Q, 4]`` -> ``[B, Q, C]``"""
        values = self.linear.in_features // 4
        encoding = sine_embedding(boxes * 2 * math.pi, values, 10000.0).flatten(-2)
        return self.norm(self.linear(encoding.to(self.linear.weight.dtype)))
