"""The encoder of Deformable DETR: every layer updates the tokens of every scale."""

import torch
from torch import Tensor, nn

from .attention import DeformableAttention
from .clone import clone_layers
from .feed_forward import FeedForward
from .scales import Scales


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each with residual and norm.

    Args:
        attention: any :class:`DeformableAttention`.
        ffn: the feed-forward network, of the same width.
        dropout: probability of zeroing an output of the attention in training.
    """

    def __init__(self, attention: DeformableAttention, ffn: FeedForward, dropout: float = 0.1):
        super().__init__()
        self.self_attn = attention
        self.norm = nn.LayerNorm(attention.output_proj.out_features)
        self.dropout = nn.Dropout(dropout)
        self.ffn = ffn

    def attend(
        self, query: Tensor, pos: Tensor, reference_points: Tensor, memory: Tensor, scales: Scales
    ) -> Tensor:
        """The attention half of the layer, for the tokens that are to be updated.

        Args:
            query: ``[B, Q, C]``, the tokens to update.
            pos: ``[B, Q, C]``, their position encodings.
            reference_points: ``[B, Q, L, 2]``, see :class:`Scales`.
            memory: ``[B, S, C]``, the tokens of all scales, which they attend to.

        Returns:
            ``[B, Q, C]``
        """
        attended = self.self_attn(query + pos, reference_points, memory, scales)
        return self.norm(query + self.dropout(attended))

    def forward(
        self,
        query: Tensor,
        pos: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        scales: Scales,
        light_ffn: FeedForward | None = None,
        num_light: int = 0,
    ) -> Tensor:
        """As :meth:`attend`, followed by the feed-forward network.

        Args:
            light_ffn: the network of the first ``num_light`` queries, where they have another.
        """
        attended = self.attend(query, pos, reference_points, memory, scales)
        if light_ffn is None:
            return self.ffn(attended)
        light, full = attended[:, :num_light], attended[:, num_light:]
        return torch.cat([light_ffn(light), self.ffn(full)], dim=1)


class DeformableEncoder(nn.Module):
    """All scales in all layers (Deformable DETR, arXiv 2010.04159, section 4.2).

    Args:
        layer: the prototype of a layer.
        num_layers: how many there are.
    """

    def __init__(self, layer: EncoderLayer, num_layers: int = 6):
        super().__init__()
        self.layers = clone_layers(layer, num_layers)

    def forward(self, tokens: Tensor, pos: Tensor, scales: Scales) -> Tensor:
        """
        Args:
            tokens: ``[B, S, C]``, all scales, high resolution first.
            pos: ``[B, S, C]``, position and level encodings.
            scales: their geometry and padding.

        Returns:
            ``[B, S, C]``, the memory.
        """
        for layer in self.layers:
            tokens = layer(tokens, pos, scales.reference_points, tokens, scales)
        return tokens
