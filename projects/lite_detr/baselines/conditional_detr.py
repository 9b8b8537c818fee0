"""Conditional DETR: the meta-architecture, its queries, attentions and decoder."""

import math

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ..modeling.decoder import DeformableDecoder
from ..modeling.heads import Predictions
from ..modeling.layers import MLP, FeedForward, sine_embedding
from ..modeling.queries import Queries
from ..modeling.scales import Scales
from .single_scale import LocatedScales, SingleScaleDetector


@META_ARCH_REGISTRY.register()
class ConditionalDETR(SingleScaleDetector):
    """Conditional DETR (arXiv 2108.06152): content and place are matched separately.

    The arguments are those of :class:`SingleScaleDetector`.
    """

    lazy_config = "common/models/conditional_detr.py"

    @configurable
    def __init__(self, **detector):
        super().__init__(**detector)


class PointQueries(nn.Module):
    """Learned positions, each with a reference point, and zeros for content (section 3.2).

    Args:
        embed_dim: channels ``C``.
        num_queries: ``Q``
    """

    def __init__(self, embed_dim: int = 256, num_queries: int = 300):
        super().__init__()
        self.pos = nn.Embedding(num_queries, embed_dim)
        self.reference_points = transformer_mlp(embed_dim, embed_dim, 2)

    def forward(self, memory: Tensor, scales: Scales) -> tuple[Queries, None]:
        """Return the queries, and no proposals; of ``memory [B, S, C]`` only ``B`` matters."""
        pos = self.pos.weight.expand(memory.shape[0], -1, -1)
        reference = self.reference_points(pos).to(scales.centers.dtype).sigmoid()
        return Queries(torch.zeros_like(pos), pos, reference), None


class SplitAttention(nn.Module):
    """Base of the attentions that project content and position separately.

    Args:
        embed_dim: channels ``C``, a multiple of ``num_heads``.
        num_heads: ``M``
        dropout: probability of zeroing a weight in training.
    """

    def __init__(self, embed_dim: int = 256, num_heads: int = 8, dropout: float = 0.1):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_content = nn.Linear(embed_dim, embed_dim)
        self.query_pos: nn.Linear | None = nn.Linear(embed_dim, embed_dim)
        self.key_content = nn.Linear(embed_dim, embed_dim)
        self.key_pos = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in self.children():
            nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(self.output_proj.bias)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
        """Attend to values ``[B, S, C]``; ``hidden`` broadcasts to ``[B, M, Q, S]``, bool."""
        split = (tokens.unflatten(-1, (self.num_heads, -1)) for tokens in (query, key, value))
        attended = F.scaled_dot_product_attention(
            *(tokens.transpose(1, 2) for tokens in split),
            attn_mask=None if hidden is None else ~hidden,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.output_proj(attended.transpose(1, 2).flatten(2))


class SplitSelfAttention(SplitAttention):
    """Self-attention whose queries and keys are sums of content and position."""

    def forward(self, content: Tensor, pos: Tensor, hidden: Tensor | None = None) -> Tensor:
        """
        Args:
            content: ``[B, Q, C]``, also the values.
            pos: ``[B, Q, C]``
            hidden: broadcasts to ``[B, M, Q, Q]``; bool, True where a query may not look.

        Returns:
            ``[B, Q, C]``
        """
        query = self.query_content(content) + self.query_pos(pos)
        key = self.key_content(content) + self.key_pos(pos)
        return self.attend(query, key, self.value(content), hidden)


class ConditionalAttention(SplitAttention):
    """Conditional cross-attention: content and place are concatenated in each head (section 3.3).

    Only in a decoder's first layer the position of a query is added to its content, and the
    position of a token to its content: later layers have no ``query_pos``.
    """

    def __init__(self, embed_dim: int = 256, num_heads: int = 8, dropout: float = 0.1):
        super().__init__(embed_dim, num_heads, dropout)
        self.query_place = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def forward(
        self, content: Tensor, pos: Tensor, place: Tensor, memory: Tensor, scales: LocatedScales
    ) -> Tensor:
        """
        Args:
            content: ``[B, Q, C]``
            pos: ``[B, Q, C]``
            place: ``[B, Q, C]``, the sine encoding of where the query looks.
            memory: ``[B, S, C]``, the values.
            scales: their positions and padding.

        Returns:
            ``[B, Q, C]``
        """
        query, key = self.query_content(content), self.key_content(memory)
        key_pos = self.key_pos(scales.pos)
        if self.query_pos is not None:
            query, key = query + self.query_pos(pos), key + key_pos
        mask = scales.padding_mask
        return self.attend(
            self.join_heads(query, self.query_place(place)),
            self.join_heads(key, key_pos),
            self.value(memory),
            None if mask is None else mask[:, None, None],
        )

    def join_heads(self, content: Tensor, place: Tensor) -> Tensor:
        """``[B, N, C]`` and ``[B, N, C]`` -> ``[B, N, 2 * C]``, together in each head."""
        parts = [tokens.unflatten(-1, (self.num_heads, -1)) for tokens in (content, place)]
        return torch.cat(parts, dim=-1).flatten(-2)


class ConditionalDecoderLayer(nn.Module):
    """Self-attention, conditional cross-attention and a feed-forward network.

    Args:
        attention: the cross-attention.
        ffn: the feed-forward network, of the same width.
        dropout: probability of zeroing an output, or a weight of the self-attention, in training.
    """

    def __init__(self, attention: ConditionalAttention, ffn: FeedForward, dropout: float = 0.1):
        super().__init__()
        embed_dim = attention.output_proj.out_features
        self.self_attn = SplitSelfAttention(embed_dim, attention.num_heads, dropout)
        self.self_attn_norm = nn.LayerNorm(embed_dim)
        self.cross_attn = attention
        self.cross_attn_norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.ffn = ffn

    def forward(
        self,
        content: Tensor,
        pos: Tensor,
        place: Tensor,
        memory: Tensor,
        scales: LocatedScales,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            content: ``[B, Q, C]``
            pos: ``[B, Q, C]``
            place: ``[B, Q, C]``, see :class:`ConditionalAttention`.
            memory: ``[B, S, C]``, the encoder's tokens.
            scales: their positions and padding.
            attn_mask: ``[Q, Q]`` bool, True where a query may not see another.

        Returns:
            ``[B, Q, C]``
        """
        attended = self.self_attn(content, pos, attn_mask)
        content = self.self_attn_norm(content + self.dropout(attended))
        attended = self.cross_attn(content, pos, place, memory, scales)
        content = self.cross_attn_norm(content + self.dropout(attended))
        return self.ffn(content)


class ConditionalDecoder(DeformableDecoder):
    """A decoder whose layers look at places around reference points (section 3.2).

    Boxes start from the same points in each layer.

    Args:
        layer: the prototype of a layer.
        heads: see :class:`DeformableDecoder`.
        norm: applied to what the heads see, but not to the next layer's queries.
    """

    def __init__(self, layer: ConditionalDecoderLayer, heads: nn.Module, norm: nn.Module):
        super().__init__(layer, heads, refine=False, norm=norm)
        for later in self.layers[1:]:
            later.cross_attn.query_pos = None
        embed_dim = layer.cross_attn.output_proj.out_features
        self.place_scale = transformer_mlp(embed_dim, embed_dim, embed_dim)

    def forward(
        self,
        queries: Queries,
        memory: Tensor,
        scales: LocatedScales,
        attn_mask: Tensor | None = None,
        last_only: bool = False,
    ) -> list[Predictions]:
        """Run the layers and predict, see :meth:`DeformableDecoder.forward`."""
        content, pos, reference = queries
        encoding = encode_place(reference, content)
        predictions = []
        for index, layer in enumerate(self.layers):
            place = encoding * self.place_scale(content) if index else encoding
            content = layer(content, pos, place, memory, scales, attn_mask)
            if index == len(self.layers) - 1 or not last_only:
                predictions.append(self.predict(index, content, reference))
        return predictions


def encode_place(reference: Tensor, content: Tensor) -> Tensor:
    """Return the sine encoding ``[B, Q, C]`` of centres, in the shape and dtype of ``content``."""
    # The released weights expect y before x.
    centers = reference[..., [1, 0]] * 2 * math.pi
    return sine_embedding(centers, content.shape[-1] // 2, 10000.0).flatten(-2).to(content.dtype)


def transformer_mlp(in_dim: int, hidden_dim: int, out_dim: int) -> MLP:
    """Return a perceptron of two layers, initialised as the references' transformers are."""
    mlp = MLP(in_dim, hidden_dim, out_dim, num_layers=2)
    for linear in (mlp[0], mlp[2]):
        nn.init.xavier_uniform_(linear.weight)
    return mlp
