"""Mixed query selection: references from the encoder's proposals, learned content."""

import math

from torch import Tensor, nn

from .heads import MLP, Predictions
from .position_encoding import sine_embedding
from .queries import BoxEncoding, ProposalQueries, Queries, at_most, take
from .scales import Scales


class HybridQueries(ProposalQueries):
    """H-DETR's queries: one-to-one ones, and in training one-to-many ones behind them.

    Content is learned; the position encodes the proposed box (H-DETR, arXiv 2207.13080, section 3).
    In inference there are only the one-to-one queries.

    Args:
        embed_dim: channels ``C``.
        num_classes: foreground classes.
        num_queries: one-to-one queries.
        num_one_to_many: one-to-many queries.
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
        """The queries, and the proposals of all ``S`` tokens for the encoder's loss."""
        wanted = self.num_queries + (self.num_one_to_many if self.training else 0)
        reference, proposals = self.propose(memory, scales, wanted)
        pos, _ = self.encode_box(reference)
        return Queries(learned_content(self.content, reference), pos, reference), proposals


class DinoQueries(ProposalQueries):
    """DINO's queries (arXiv 2203.03605, section 3.4): learned content, proposals by class score.

    A proposal counts by its best class, and only the selected ones get boxes and are trained. The
    position part is left to the decoder, which encodes the references of each layer.

    Args:
        embed_dim: channels ``C``.
        num_classes: foreground classes.
        num_queries: ``Q``; an image with fewer tokens gets as many queries as it has tokens.
    """

    class_agnostic = False

    def __init__(self, embed_dim: int = 256, num_classes: int = 80, num_queries: int = 900):
        super().__init__(embed_dim, num_classes)
        self.num_queries = num_queries
        self.content = nn.Embedding(num_queries, embed_dim)

    def forward(self, memory: Tensor, scales: Scales) -> tuple[Queries, Predictions]:
        """The queries, and the ``Q`` selected proposals for the encoder's loss."""
        features, anchors = self.proposal_features(memory, scales)
        logits = self.class_embed(features)
        count = at_most(self.num_queries, memory.shape[1])
        best = logits.amax(-1).topk(count, dim=1).indices
        box_logits = self.bbox_embed(take(features, best)).to(anchors.dtype) + take(anchors, best)
        boxes = box_logits.sigmoid()
        content = learned_content(self.content, boxes)
        proposals = Predictions(take(logits, best).to(boxes.dtype), boxes)
        return Queries(content, None, boxes.detach()), proposals


class ReferencePosition(nn.Module):
    """The position part of DINO's queries: an MLP on the sine encoding of their references.

    Args:
        embed_dim: channels ``C``.
    """

    def __init__(self, embed_dim: int = 256):
        super().__init__()
        self.embed_dim = embed_dim
        self.mlp = MLP(2 * embed_dim, embed_dim, embed_dim, num_layers=2)
        for linear in (self.mlp[0], self.mlp[2]):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, boxes: Tensor) -> Tensor:
        """``[B, Q, 4]``, in the padded frame of the finest scale -> ``[B, Q, C]``"""
        # The released weights expect y before x.
        boxes = boxes[..., [1, 0, 2, 3]]
        encoding = sine_embedding(boxes * 2 * math.pi, self.embed_dim // 2, 10000.0).flatten(-2)
        return self.mlp(encoding.to(self.mlp[0].weight.dtype))


def learned_content(embedding: nn.Embedding, reference: Tensor) -> Tensor:
    """The first ``Q`` embeddings for each image of references ``[B, Q, 4]``: ``[B, Q, C]``."""
    batch, queries, _ = reference.shape
    return embedding.weight[:queries].expand(batch, -1, -1)
