"""Lite DETR's encoder for your own module: tokens, sizes and padding in, tokens out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling import (
    EncoderLayer,
    FeedForward,
    KeyAwareDeformableAttention,
    SinePositionEncoding,
    interleaved_encoder,
)
from ..modeling.attention import DeformableAttention
from ..modeling.interleaved_encoder import check_order, parse_notation
from ..modeling.scales import Scales
from .levels import exact_dtype, make_levels


class InterleavedEncoder(interleaved_encoder.InterleavedEncoder):
    """The interleaved encoder with positions and levels of its own.

    Names of parameters are those of a detector's ``encoder``, and ``level_embed``.

    Args:
        embed_dim: channels ``C``, a multiple of 4 and of ``num_heads``.
        notation: the paper's: ``H3L1-(2+1)x3`` has 3 high-level and 1 low-level scale, and 3 blocks
            of 2 updates.
        num_heads: ``M``
        num_points: ``P``, for each head and level.
        ffn_dim: width of the feed-forward networks' hidden layer.
        dropout: probability of zeroing an activation in training.
        attention: the class of the attentions.

    Raises:
        ConfigError: the notation is another one, or a number is out of its range.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        notation: str = "H3L1-(2+1)x3",
        num_heads: int = 8,
        num_points: int = 4,
        ffn_dim: int = 1024,
        dropout: float = 0.0,
        attention: type[DeformableAttention] = KeyAwareDeformableAttention,
    ):
        num_levels, options = parse_notation(notation)
        layer = EncoderLayer(
            attention(embed_dim, num_heads, num_levels, num_points),
            FeedForward(embed_dim, ffn_dim, dropout),
            dropout,
        )
        super().__init__(layer, **options)
        self.position_encoding = SinePositionEncoding(embed_dim)
        self.level_embed = nn.Parameter(torch.randn(num_levels, embed_dim))

    def forward(
        self,
        tokens: Tensor,
        spatial_shapes: Any,
        padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            tokens: ``[B, S, C]``, level after level, fine to coarse, see
                :func:`~lite_detr.interop.flatten_maps`.
            spatial_shapes: ``[L, 2]``, ``(H_l, W_l)``: a tensor of any integer dtype or a list.
            padding_mask: ``[B, S]``, true on padding, which is at the bottom and right of maps.
            pos: ``[B, S, C]``, position encodings of your own; None makes sines. The levels'
                encodings are added to both.

        Returns:
            ``[B, S, C]``

        Raises:
            LevelsError: the levels do not fit the encoder in number or order, or the tokens or the
                mask in size.
        """
        levels = make_levels(spatial_shapes, tokens, padding_mask, self.num_levels)
        check_order(levels.shapes, self.num_levels, self.num_low_levels)
        masks = split_mask(levels.padding_mask, levels.shapes, tokens)
        if pos is None:
            pos = torch.cat([self.position_encoding(mask) for mask in masks], dim=1)
        embeds = [
            embed.expand(height * width, -1)
            for embed, (height, width) in zip(self.level_embed, levels.shapes)
        ]
        pos = pos.to(tokens.dtype) + torch.cat(embeds)
        scales = Scales.from_masks(masks, padding_mask is not None, exact_dtype(tokens.dtype))
        return super().forward(tokens, pos, scales)


def split_mask(
    padding_mask: Tensor | None, shapes: Sequence[tuple[int, int]], tokens: Tensor
) -> list[Tensor]:
    """Return the padding ``[B, H_l, W_l]`` of each level; all False without a mask."""
    if padding_mask is None:
        padding_mask = tokens.new_zeros(tokens.shape[:2], dtype=torch.bool)
    levels = padding_mask.split([height * width for height, width in shapes], dim=1)
    return [level.unflatten(1, shape) for level, shape in zip(levels, shapes)]
