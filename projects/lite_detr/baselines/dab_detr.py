"""DAB-DETR: the meta-architecture, its anchors, encoder and decoder."""

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ..modeling.decoder import DeformableDecoder
from ..modeling.dino import ReferencePosition
from ..modeling.encoder import DeformableEncoder, EncoderLayer
from ..modeling.heads import PredictionHeads, Predictions
from ..modeling.layers import FeedForward
from ..modeling.queries import Queries
from ..modeling.scales import Scales
from .conditional_detr import ConditionalDecoderLayer, encode_place, transformer_mlp
from .single_scale import LocatedScales, SingleScaleDetector


@META_ARCH_REGISTRY.register()
class DABDETR(SingleScaleDetector):
    """DAB-DETR (arXiv 2201.12329): queries are anchor boxes that each layer moves.

    The arguments are those of :class:`SingleScaleDetector`.
    """

    lazy_config = "common/models/dab_detr.py"

    @configurable
    def __init__(self, **detector):
        super().__init__(**detector)


class AnchorBoxes(nn.Module):
    """Learned anchor boxes, with zeros or learned patterns for content (section 4.1).

    Args:
        embed_dim: channels ``C``.
        num_queries: the number of anchors.
        num_patterns: each anchor is a query with each pattern; 0 makes one query of zeros.
        uniform_centers: draw the first centres evenly over the image instead of around its middle.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_queries: int = 300,
        num_patterns: int = 0,
        uniform_centers: bool = False,
    ):
        super().__init__()
        self.embed_dim = embed_dim
        self.anchor_logits = nn.Embedding(num_queries, 4)
        if uniform_centers:
            with torch.no_grad():
                self.anchor_logits.weight[:, :2].uniform_(0, 1).logit_(eps=1e-3)
        self.patterns = nn.Embedding(num_patterns, embed_dim) if num_patterns else None

    def forward(self, memory: Tensor, scales: Scales) -> tuple[Queries, None]:
        """Return the queries, pattern by pattern, and no proposals.

        Of ``memory [B, S, C]`` only ``B`` matters.
        """
        logits = self.anchor_logits.weight
        content = self.content(len(logits))
        logits = logits.repeat(len(content) // len(logits), 1)
        batch = memory.shape[0]
        reference = logits.to(scales.centers.dtype).sigmoid().expand(batch, -1, -1)
        return Queries(content.expand(batch, -1, -1), None, reference), None

    def content(self, num_anchors: int) -> Tensor:
        """Return the content of all queries, ``[Q, C]``."""
        if self.patterns is None:
            return self.anchor_logits.weight.new_zeros(num_anchors, self.embed_dim)
        return self.patterns.weight.repeat_interleave(num_anchors, dim=0)


class PReLUFeedForward(FeedForward):
    """A feed-forward network whose activation has a learned slope below zero."""

    def __init__(self, embed_dim: int = 256, hidden_dim: int = 2048, dropout: float = 0.0):
        super().__init__(embed_dim, hidden_dim, dropout)
        self.activation = nn.PReLU()


class ScaledEncoder(DeformableEncoder):
    """An encoder whose tokens scale their own position encodings, before each layer.

    Args:
        layer: the prototype of a layer.
        num_layers: the number of layers.
    """

    def __init__(self, layer: EncoderLayer, num_layers: int = 6):
        super().__init__(layer, num_layers)
        embed_dim = layer.norm.normalized_shape[0]
        self.pos_scale = transformer_mlp(embed_dim, embed_dim, embed_dim)

    def forward(self, tokens: Tensor, pos: Tensor, scales: Scales) -> Tensor:
        """Return the memory, see :meth:`DeformableEncoder.forward`."""
        for index in range(len(self.layers)):
            tokens = self.update(index, tokens, pos, scales)
        return tokens

    def update(self, index: int, tokens: Tensor, pos: Tensor, scales: Scales) -> Tensor:
        """Apply one layer to tokens ``[B, S, C]``."""
        pos = pos * self.pos_scale(tokens)
        return self.layers[index](tokens, pos, scales.reference_points, tokens, scales)


class AnchorDecoder(DeformableDecoder):
    """A decoder that looks at places in and around anchors, and moves them (section 4).

    How far it looks along each axis follows the anchor's size (section 4.4). A layer's boxes start
    from its anchors, of which all but the first are also trained by the boxes of the next layer.

    Args:
        layer: the prototype of a layer.
        heads: see :class:`DeformableDecoder`.
        norm: applied to what the heads see, but not to the next layer's queries and anchors.
    """

    def __init__(self, layer: ConditionalDecoderLayer, heads: PredictionHeads, norm: nn.Module):
        embed_dim = layer.cross_attn.output_proj.out_features
        query_pos = ReferencePosition(embed_dim)
        super().__init__(layer, heads, look_forward_twice=True, query_pos=query_pos, norm=norm)
        for later in self.layers[1:]:
            later.cross_attn.query_pos = None
        self.place_scale = transformer_mlp(embed_dim, embed_dim, embed_dim)
        self.size_head = transformer_mlp(embed_dim, embed_dim, 2)

    def forward(
        self,
        queries: Queries,
        memory: Tensor,
        scales: LocatedScales,
        attn_mask: Tensor | None = None,
        last_only: bool = False,
    ) -> list[Predictions]:
        """Run the layers and predict, see :meth:`DeformableDecoder.forward`."""
        content, _, reference = queries
        anchor = reference  # where predictions start from: the same values, other gradients
        predictions = []
        for index in range(len(self.layers)):
            content = self.update(index, content, reference, memory, scales, attn_mask)
            last = index == len(self.layers) - 1
            if last or not last_only:
                predictions.append(self.predict(index, content, anchor))
            if not last:
                anchor = self.heads.refine(index, content, reference)
                reference = anchor.detach()
        return predictions

    def update(
        self,
        index: int,
        content: Tensor,
        reference: Tensor,
        memory: Tensor,
        scales: LocatedScales,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Apply one layer to queries ``[B, Q, C]`` with anchors ``[B, Q, 4]``."""
        place = encode_place(reference[..., :2], content)
        if index:
            place = place * self.place_scale(content)
        wanted = self.size_head(content).sigmoid()
        # Width and height, for encodings that have y before x.
        ratio = (wanted / reference[..., 2:].to(wanted.dtype)).flip(-1)
        place = (place.unflatten(-1, (2, -1)) * ratio[..., None]).flatten(-2)
        pos = self.query_pos(reference)
        return self.layers[index](content, pos, place, memory, scales, attn_mask)
