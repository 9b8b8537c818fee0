"""An experiment: Lite DETR's encoder, whose low-level updates take the best-scored tokens only."""

import torch
from torch import Tensor, nn

from ..modeling.encoder import EncoderLayer
from ..modeling.interleaved_encoder import InterleavedEncoder
from ..modeling.queries import gather_queries
from ..modeling.scales import Scales
from .sparse_encoder import Selection, check_keep_ratio, choose_best, gather_reference_points


class SparseInterleavedEncoder(InterleavedEncoder):
    """Interleaved encoder with sparse low-level updates: an experiment, of no paper.

    A block's last layer takes all high-level tokens as queries, and the low-level ones with the
    highest scores, which are given once, before the first layer. The other low-level tokens stay as
    they were, and are keys and values as well. The layers are those of
    :class:`InterleavedEncoder`, whose weights load. :class:`SparseTraining` trains the scores.

    Args:
        layer, num_high_levels, num_blocks, updates_per_block: see :class:`InterleavedEncoder`.
        keep_ratio: the share of an image's low-level tokens to update, above 0 and up to 1.

    Raises:
        ConfigError: a number is out of its range.
    """

    def __init__(
        self,
        layer: EncoderLayer,
        num_high_levels: int = 3,
        num_blocks: int = 3,
        updates_per_block: int = 2,
        keep_ratio: float = 0.25,
    ):
        super().__init__(layer, num_high_levels, num_blocks, updates_per_block)
        check_keep_ratio(keep_ratio)
        self.keep_ratio = keep_ratio
        width = layer.norm.normalized_shape[0]
        # Smaller than Sparse DETR's, which would cost a fifth of what the updates save.
        self.scorer = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width // 4), nn.GELU(), nn.Linear(width // 4, 1)
        )

    def forward(self, tokens: Tensor, pos: Tensor, scales: Scales) -> Tensor:
        """See :meth:`InterleavedEncoder.forward`."""
        memory, _ = self.update(tokens, pos, scales, self.select(tokens, pos, scales))
        return memory

    def select(self, tokens: Tensor, pos: Tensor, scales: Scales) -> Selection:
        """Choose the low-level tokens to update; there are scores of these alone."""
        self.check_scales(scales)
        low = slice(scales.start(self.num_low_levels))
        padding = None if scales.padding_mask is None else scales.padding_mask[:, low]
        scores = self.scorer(tokens[:, low] + pos[:, low]).squeeze(-1)
        return choose_best(scores, padding, self.keep_ratio)

    def update(
        self, tokens: Tensor, pos: Tensor, scales: Scales, selection: Selection
    ) -> tuple[Tensor, list[Tensor]]:
        """Update the high-level tokens and the chosen ones.

        Returns:
            ``[B, S, C]``, the memory; and no tokens of single layers, which no detector trains.
        """
        split, count = scales.start(self.num_low_levels), selection.tokens.shape[1]
        high = torch.arange(split, tokens.shape[1], device=tokens.device)
        queries = torch.cat([selection.tokens, high.expand(tokens.shape[0], -1)], dim=1)
        pos = gather_queries(pos, queries)
        reference_points = gather_reference_points(scales, queries)
        places = selection.tokens[..., None].expand(-1, -1, tokens.shape[-1])
        low, high = tokens[:, :split], tokens[:, split:]
        before = chosen = low.gather(1, places)
        for index, layer in enumerate(self.layers):
            block, update = divmod(index, self.updates_per_block)
            memory = torch.cat([low, high], dim=1)
            if update < self.updates_per_block - 1:
                high = layer(high, pos[:, count:], reference_points[:, count:], memory, scales)
                continue
            query = torch.cat([chosen, high], dim=1)
            light_ffn = self.low_level_ffns[block]
            query = layer(query, pos, reference_points, memory, scales, light_ffn, count)
            chosen, high = query[:, :count], query[:, count:]
            kept = torch.where(selection.surplus, before, chosen)
            low = low.scatter(1, places, kept.to(low.dtype))
        return torch.cat([low, high], dim=1), []
