"""Lite DETR's encoder: high-level scales are updated often, low-level ones rarely."""

import re
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import ConfigError, LevelsError
from .encoder import EncoderLayer
from .layers import FeedForward, clone_layers
from .scales import Scales


class InterleavedEncoder(nn.Module):
    """Interleaved multi-scale encoder (Lite DETR, arXiv 2303.07335, sections 3.2 and 3.3, fig. 3).

    ``H3L1-(2+1)x3`` in the paper's notation is ``num_high_levels=3`` (of four scales, so one is
    low-level), ``updates_per_block=2``, ``num_blocks=3``; see :func:`parse_notation`. As in the
    released code, a block has ``updates_per_block`` layers, and every variant of the paper has six
    layers in total:

    - every layer but the block's last takes only the high-level tokens as queries (iterative
      high-level feature cross-scale fusion, section 3.2);
    - the last takes all tokens as queries: it updates the high-level ones once more and the
      low-level ones for the only time in the block (efficient low-level cross-scale fusion,
      section 3.3). There the low-level tokens pass a light feed-forward network of hidden width
      ``C`` with its own weights and norm, the high-level ones the layer's full one.

    All tokens are keys and values throughout.

    Args:
        layer: the prototype of a layer.
        num_high_levels: the number of coarsest scales that are high-level.
        num_blocks: how often the low-level scales are updated.
        updates_per_block: how often each block updates the high-level scales.

    Raises:
        ConfigError: a number is out of its range.
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
            raise ConfigError(
                f"num_high_levels must leave at least one of the {num_levels} scales low-level, "
                f"so 1 to {num_levels - 1}; got {num_high_levels}"
            )
        if num_blocks < 1 or updates_per_block < 1:
            raise ConfigError(
                "num_blocks and updates_per_block must be at least 1, "
                f"got {num_blocks} and {updates_per_block}"
            )
        self.num_levels = num_levels
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

        Raises:
            LevelsError: the scales are of another number, or do not run from fine to coarse.
        """
        self.check_scales(scales)
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

    def check_scales(self, scales: Scales) -> None:
        """Raise a ``LevelsError`` if the scales are of another number, or in another order."""
        # Sizes are numbers to compare in eager mode only; to a tracer they are variables.
        if not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
            check_order(scales.shapes, self.num_levels, self.num_low_levels)


def check_order(shapes: Sequence[tuple[int, int]], num_levels: int, num_low_levels: int) -> None:
    """Raise a ``LevelsError`` unless there are ``num_levels`` levels, from fine to coarse."""
    sizes = ", ".join(f"{height}x{width}" for height, width in shapes)
    if len(shapes) != num_levels:
        raise LevelsError(
            f"the encoder is built for {num_levels} levels, got {len(shapes)}: {sizes} "
            "(height x width)"
        )
    for finer, coarser in pairwise(shapes):
        if coarser[0] > finer[0] or coarser[1] > finer[1]:
            raise LevelsError(
                f"levels must run from fine to coarse, as the first {num_low_levels} of them are "
                f"updated rarely, got {sizes} (height x width): reverse the order of the levels, "
                "and of their tokens"
            )


def parse_notation(variant: str) -> tuple[int, dict[str, int]]:
    """Parse the paper's notation of an interleaved encoder.

    Args:
        variant: such as ``H3L1-(2+1)x3``: 3 high-level scales, 1 low-level scale, and 3 blocks of 2
            updates.

    Returns:
        The number of scales, and the arguments of :class:`InterleavedEncoder`.

    Raises:
        ConfigError: it is not in this notation.
    """
    match = re.fullmatch(r"H(\d+)L(\d+)-\((\d+)\+1\)x(\d+)", variant)
    if match is None:
        raise ConfigError(
            f"{variant!r} is not an interleaved encoder in the paper's notation, such as "
            "'H3L1-(2+1)x3': 3 high-level scales, 1 low-level scale, 3 blocks of 2 updates"
        )
    num_high, num_low, updates_per_block, num_blocks = map(int, match.groups())
    options = {
        "num_high_levels": num_high,
        "num_blocks": num_blocks,
        "updates_per_block": updates_per_block,
    }
    return num_high + num_low, options
