"""The decoder: queries attend to each other, then to the memory, and move their boxes."""

import copy

from torch import Tensor, nn

from .attention import DeformableAttention
from .heads import MixedPredictions, PredictionHeads, Predictions
from .layers import FeedForward, clone_layers
from .queries import Queries
from .scales import Scales


class DecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention and a feed-forward network.

    Args:
        attention: any :class:`DeformableAttention`, the cross-attention.
        ffn: the feed-forward network, of the same width.
        dropout: probability of zeroing an output, or a weight of the self-attention, in training.
    """

    def __init__(self, attention: DeformableAttention, ffn: FeedForward, dropout: float = 0.1):
        super().__init__()
        embed_dim = attention.output_proj.out_features
        self.self_attn = nn.MultiheadAttention(
            embed_dim, attention.num_heads, dropout=dropout, batch_first=True
        )
        self.self_attn_norm = nn.LayerNorm(embed_dim)
        self.cross_attn = attention
        self.cross_attn_norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.ffn = ffn
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.self_attn.in_proj_weight, self.self_attn.out_proj.weight):
            nn.init.xavier_uniform_(weight)
        for bias in (self.self_attn.in_proj_bias, self.self_attn.out_proj.bias):
            nn.init.zeros_(bias)

    def forward(
        self,
        content: Tensor,
        pos: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        scales: Scales,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            content: ``[B, Q, C]``
            pos: ``[B, Q, C]``, added to the content in both attentions.
            reference_points: ``[B, Q, L, 2 or 4]``, in the padded frame of each scale.
            memory: ``[B, S, C]``, the encoder's tokens.
            scales: their geometry and padding.
            attn_mask: ``[Q, Q]`` bool, True where a query may not see another.

        Returns:
            ``[B, Q, C]``
        """
        query = content + pos
        attended, _ = self.self_attn(query, query, content, attn_mask=attn_mask, need_weights=False)
        content = self.self_attn_norm(content + self.dropout(attended))
        attended = self.cross_attn(content + pos, reference_points, memory, scales)
        content = self.cross_attn_norm(content + self.dropout(attended))
        return self.ffn(content)


class MixedDecoderLayer(DecoderLayer):
    """MS-DETR's layer (arXiv 2401.03989): queries see the memory first and each other then.

    In between, a feed-forward network of its own makes what predicts one-to-many in training.

    Args:
        attention, ffn, dropout: see :class:`DecoderLayer`.
    """

    def __init__(self, attention: DeformableAttention, ffn: FeedForward, dropout: float = 0.1):
        super().__init__(attention, ffn, dropout)
        self.one_to_many_ffn = copy.deepcopy(ffn)
        self.one_to_many_ffn.reset_parameters()

    def forward(
        self,
        content: Tensor,
        pos: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        scales: Scales,
        attn_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return ``[B, Q, C]``, in training with that of the one-to-many predictions.

        The arguments are those of :meth:`DecoderLayer.forward`.
        """
        attended = self.cross_attn(content + pos, reference_points, memory, scales)
        early = self.cross_attn_norm(content + self.dropout(attended))
        query = early + pos
        attended, _ = self.self_attn(query, query, early, attn_mask=attn_mask, need_weights=False)
        content = self.ffn(self.self_attn_norm(early + self.dropout(attended)))
        return (content, self.one_to_many_ffn(early)) if self.training else content


class DeformableDecoder(nn.Module):
    """A stack of layers, each of which predicts (Deformable DETR, section 4.2).

    Args:
        layer: the prototype of a layer.
        heads: predict from each layer's queries; they set the number of layers.
        refine: iterative bounding box refinement: a layer's boxes are the next one's references
            (appendix A.4.1). Otherwise all layers sample around, and predict from, the first ones.
        look_forward_twice: a layer's boxes also train the layer before it, whose boxes they start
            from (DINO, arXiv 2203.03605, section 3.5).
        query_pos: makes the position part from each layer's references; None keeps the queries'
            own.
        norm: applied to what the heads see, but not to the next layer's queries and references.
    """

    def __init__(
        self,
        layer: DecoderLayer,
        heads: PredictionHeads,
        refine: bool = True,
        look_forward_twice: bool = False,
        query_pos: nn.Module | None = None,
        norm: nn.Module | None = None,
    ):
        super().__init__()
        self.layers = clone_layers(layer, heads.num_layers)
        self.heads = heads
        self.refine = refine
        self.look_forward_twice = look_forward_twice
        self.query_pos = query_pos
        self.norm = norm if norm is not None else nn.Identity()

    def forward(
        self,
        queries: Queries,
        memory: Tensor,
        scales: Scales,
        attn_mask: Tensor | None = None,
        last_only: bool = False,
    ) -> list[Predictions]:
        """Run the layers and predict.

        Args:
            queries: content, position and references.
            memory: ``[B, S, C]``, the encoder's tokens.
            scales: their geometry and padding.
            attn_mask: ``[Q, Q]`` bool, True where a query may not see another.
            last_only: skip what only trains the layers before the last.

        Returns:
            The predictions of each layer, first to last; with ``last_only`` only the last one's.
        """
        content, pos, reference = queries
        # Images cover only their valid share of the padded maps that attention samples from.
        to_padded = scales.valid_ratios[:, None].repeat(1, 1, 1, reference.shape[-1] // 2)
        anchor = reference  # where predictions start from: the same values, other gradients
        predictions = []
        for index, layer in enumerate(self.layers):
            reference_points = reference[:, :, None] * to_padded
            if self.query_pos is not None:
                pos = self.query_pos(reference_points[:, :, 0]).to(content.dtype)
            content = layer(content, pos, reference_points, memory, scales, attn_mask)
            one_to_many = None
            if isinstance(content, tuple):
                content, one_to_many = content
            last = index == len(self.layers) - 1
            if last or not last_only:
                predictions.append(self.predict(index, content, anchor))
            if one_to_many is not None:
                early = self.predict(index, one_to_many, anchor)
                predictions[-1] = MixedPredictions.join(predictions[-1], early)
            if self.refine and not last:
                if self.look_forward_twice:
                    anchor = self.heads.refine(index, content, reference)
                elif last_only:
                    anchor = self.heads.predict_boxes(index, self.norm(content), anchor)
                else:
                    anchor = predictions[-1].boxes.detach()
                reference = anchor.detach()
                to_padded = scales.valid_ratios[:, None].repeat(1, 1, 1, 2)
        return predictions

    @property
    def is_mixed(self) -> bool:
        """True if its layers also predict one-to-many in training."""
        return isinstance(self.layers[0], MixedDecoderLayer)

    def predict(self, layer: int, content: Tensor, anchor: Tensor) -> Predictions:
        """Predict from a layer's queries ``[B, Q, C]``, with boxes that start from ``anchor``."""
        state = self.norm(content)
        boxes = self.heads.predict_boxes(layer, state, anchor)
        return Predictions(self.heads.classify(layer, state).to(boxes.dtype), boxes)
