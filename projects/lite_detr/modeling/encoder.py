"""Deformable DETR's encoder: every layer updates the tokens of every scale."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import DeformableAttention
from .layers import FeedForward, clone_layers
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
        """Apply the attention half of the layer to the tokens to update.

        Args:
            query: ``[B, Q, C]``, the tokens to update.
            pos: ``[B, Q, C]``, their position encodings.
            reference_points: ``[B, Q, L, 2]``, see :class:`Scales`.
            memory: ``[B, S, C]``, the tokens of all scales, which the queries attend to.
            scales: their geometry and padding.

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
        """Apply :meth:`attend` and then the feed-forward network.

        Args:
            light_ffn: a separate network for the first ``num_light`` queries; None uses the
                layer's own for all.
        """
        attended = self.attend(query, pos, reference_points, memory, scales)
        if light_ffn is None:
            return self.ffn(attended)
        light, full = attended[:, :num_light], attended[:, num_light:]
        return torch.cat([light_ffn(light), self.ffn(full)], dim=1)


class CheckpointedEncoderLayer(EncoderLayer):
    """An encoder layer that keeps only its input for the backward pass.

    The backward pass computes everything in between again, with the same dropout and in the same
    precision, so gradients are the same and training needs less memory. Parameter names are those
    of :class:`EncoderLayer`. Hooks on the parts inside run twice per training pass. Without
    gradients this is an :class:`EncoderLayer`.
    """

    def forward(self, *args, **options) -> Tensor:
        """See :meth:`EncoderLayer.forward`."""
        if not torch.is_grad_enabled():
            return super().forward(*args, **options)
        return checkpoint(super().forward, *args, use_reentrant=False, **options)


class DeformableEncoder(nn.Module):
    """Update all scales in all layers (Deformable DETR, arXiv 2010.04159, section 4.2).

    Args:
        layer: the prototype of a layer.
        num_layers: the number of layers.
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
