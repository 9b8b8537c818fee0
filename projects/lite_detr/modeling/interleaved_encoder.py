"""The encoder of Lite DETR: high-level scales are updated often, low-level ones rarely."""

import torch
from torch import Tensor, nn

from .clone import clone_layers
from .encoder import EncoderLayer
from .feed_forward import FeedForward
from .scales import Scales


class InterleavedEncoder(nn.Module):
    """Interleaved multi-scale encoder (Lite DETR, arXiv 2303.07335, sections 3.2 and 3.3, fig. 3).

    ``H3L1-(2+1)x3`` in the paper's notation is ``num_high_levels=3`` (of four scales, so one
    low-level one), ``updates_per_block=2``, ``num_blocks=3``. As in the released code a block has
    ``updates_per_block`` layers, six in all in every variant of the paper:

    - every layer but the block's last takes the high-level tokens alone as queries (iterative
      high-level feature cross-scale fusion, section 3.2);
    - the last takes all tokens as queries, which updates the high-level ones once more and the
      low-level ones for the only time in the block (efficient low-level cross-scale fusion,
      section 3.3). There the low-level tokens pass a light feed-forward network of hidden width
      ``C`` with its own weights and norm, the high-level ones the layer's full one.

    All tokens are keys and values throughout.

    Args:
        layer: the prototype of a layer.
        num_high_levels: how many of the coarsest scales are high-level.
        num_blocks: how often the low-level scales are updated.
        updates_per_block: how often the high-level scales are updated in a block.
    """

    def __init__(
        self,
        layer: EncoderLayer,
        num_high_levels: int = 3,
        num_blocks: int = 3,
        updates_per_block: int = 2,
    ):
        super().__init__()
        num_levels = layer.self_attn.num_levels
        if not 0 < num_high_levels < num_levels:
            raise ValueError(
                f"num_high_levels must leave at least one of the {num_levels} scales low-level, "
                f"so 1 to {num_levels - 1}; got {num_high_levels}"
            )
        if num_blocks < 1 or updates_per_block < 1:
            raise ValueError(
                "num_blocks and updates_per_block must be at least 1, "
                f"got {num_blocks} and {updates_per_block}"
            )
        self.num_low_levels = num_levels - num_high_levels
        self.updates_per_block = updates_per_block
        self.layers = clone_layers(layer, num_blocks * updates_per_block)
        width = layer.norm.normalized_shape[0]
        light_ffn = FeedForward(width, hidden_dim=width, dropout=layer.ffn.dropout.p)
        self.low_level_ffns = clone_layers(light_ffn, num_blocks)

    def forward(self, tokens: Tensor, pos: Tensor, scales: Scales) -> Tensor:
        """
        Args:
            tokens: ``[B, S, C]``, all scales, high resolution first.
            pos: ``[B, S, C]``, position and level encodings.
            scales: their geometry and padding.

        Returns:
            ``[B, S, C]``, the memory.
        """
        split = scales.start(self.num_low_levels)
        high_pos = pos[:, split:]
        high_reference_points = scales.reference_points[:, split:]
        for index, layer in enumerate(self.layers):
            block, update = divmod(index, self.updates_per_block)
            if update < self.updates_per_block - 1:
                low, high = tokens[:, :split], tokens[:, split:]
                high = layer(high, high_pos, high_reference_points, tokens, scales)
                tokens = torch.cat([low, high], dim=1)
            else:
                light_ffn = self.low_level_ffns[block]
                tokens = layer(
                    tokens, pos, scales.reference_points, tokens, scales, light_ffn, split
                )
        return tokens
