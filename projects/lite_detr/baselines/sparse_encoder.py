"""Sparse DETR's encoder, which updates the best-scored tokens only, and the training of scores."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from detectron2.utils import comm
from torch import Tensor, nn

from ..errors import ConfigError
from ..modeling.attention import DeformableAttention
from ..modeling.criterion import Target, share_of_batch
from ..modeling.detector import Detector
from ..modeling.encoder import EncoderLayer
from ..modeling.layers import clone_layers
from ..modeling.queries import anchor_logits, gather_queries
from ..modeling.scales import Scales
from .single_scale import ExtendedScales


class Selection(NamedTuple):
    """The tokens that a sparse encoder updates.

    Attributes:
        scores: ``[B, S]`` of the tokens that there is a choice of, which are the first; the lowest
            one on padding.
        tokens: ``[B, K]`` int64, the chosen tokens by falling score; ``K`` is the largest number of
            an image of the batch.
        counts: ``[B]``, how many of them are of the image itself; the others are surplus.
    """

    scores: Tensor
    tokens: Tensor
    counts: Tensor

    @property
    def surplus(self) -> Tensor:
        """``[B, K, 1]`` bool, True on the surplus tokens of an image."""
        rank = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (rank >= self.counts[:, None])[..., None]


class TokenScorer(nn.Module):
    """Score every token before the encoder (Sparse DETR, arXiv 2111.14330, section 3.2).

    Half of the channels are replaced by their mean over all tokens.

    Args:
        embed_dim: channels ``C``.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        self.enc_output = nn.Linear(embed_dim, embed_dim)
        self.enc_output_norm = nn.LayerNorm(embed_dim)
        half, quarter = embed_dim // 2, embed_dim // 4
        self.mix = nn.Sequential(
            nn.LayerNorm(embed_dim), nn.Linear(embed_dim, embed_dim), nn.GELU()
        )
        self.score = nn.Sequential(
            nn.Linear(embed_dim, half),
            nn.GELU(),
            nn.Linear(half, quarter),
            nn.GELU(),
            nn.Linear(quarter, 1),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, tokens: Tensor, scales: Scales) -> Tensor:
        """Tokens with their positions ``[B, S, C]`` -> scores ``[B, S]``"""
        _, usable = anchor_logits(scales)
        features = self.enc_output_norm(self.enc_output(tokens.masked_fill(~usable, 0.0)))
        local, common = self.mix(features).chunk(2, dim=-1)
        # As in the reference, padding counts in the mean.
        mixed = torch.cat([local, common.mean(1, keepdim=True).expand_as(local)], dim=-1)
        return self.score(mixed).squeeze(-1)


def largest_count(counts: Tensor, num_tokens: int, ratio: float) -> int:
    """Return the largest of the counts ``[B]``, which are about this share of the tokens or less.

    A GPU is waited for. Of traced images only shapes are known: then at least that number.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        # In integers, which exports keep as a formula.
        return num_tokens * math.ceil(ratio * 10**6) // 10**6 + 1
    return int(counts.max())


def choose_best(scores: Tensor, padding: Tensor | None, ratio: float) -> Selection:
    """Choose the share of an image's tokens with the highest scores ``[B, S]``.

    Args:
        padding: ``[B, S]`` bool, True on padding, which is not chosen; None if there is none.
    """
    if padding is None:
        valid = torch.full((len(scores),), scores.shape[1], device=scores.device)
    else:
        scores = scores.masked_fill(padding, scores.min())
        valid = (~padding).sum(1)
    # The product in float32, as in the reference.
    counts = (valid.float() * ratio).long() + 1
    largest = largest_count(counts, scores.shape[1], ratio)
    order = scores.argsort(dim=1, descending=True)
    return Selection(scores, order[:, :largest], counts)


def gather_reference_points(scales: Scales, tokens: Tensor) -> Tensor:
    """Return the reference points ``[B, K, L, 2]`` of tokens ``[B, K]`` as queries."""
    return gather_queries(scales.reference_points.flatten(2), tokens).unflatten(-1, (-1, 2))


def check_keep_ratio(ratio: float) -> None:
    """Raise a ``ConfigError`` unless a share of tokens to update is above 0 and at most 1."""
    if not 0 < ratio <= 1:
        raise ConfigError(f"keep_ratio must be above 0 and at most 1, got {ratio}")


class SparseEncoder(nn.Module):
    """Update the best-scored tokens in all layers (Sparse DETR, arXiv 2111.14330, section 3).

    The other tokens stay as they were, and are keys and values as well. The scores are not trained
    by what comes after them; :class:`SparseTraining` does that.

    Args:
        layer: the prototype of a layer.
        num_layers: the number of layers.
        keep_ratio: the share of an image's tokens to update, above 0 and up to 1.

    Raises:
        ConfigError: ``keep_ratio`` is out of its range.
    """

    def __init__(self, layer: EncoderLayer, num_layers: int = 6, keep_ratio: float = 0.3):
        super().__init__()
        check_keep_ratio(keep_ratio)
        self.layers = clone_layers(layer, num_layers)
        self.keep_ratio = keep_ratio
        self.scorer = TokenScorer(layer.norm.normalized_shape[0])

    def forward(self, tokens: Tensor, pos: Tensor, scales: Scales) -> Tensor:
        """
        Args:
            tokens: ``[B, S, C]``, all scales, high resolution first.
            pos: ``[B, S, C]``, position and level encodings.
            scales: their geometry and padding.

        Returns:
            ``[B, S, C]``, the memory.
        """
        memory, _ = self.update(tokens, pos, scales, self.select(tokens, pos, scales))
        return memory

    def select(self, tokens: Tensor, pos: Tensor, scales: Scales) -> Selection:
        """Choose the tokens to update."""
        scores = self.scorer(tokens + pos, scales)
        return choose_best(scores, scales.padding_mask, self.keep_ratio)

    def update(
        self, tokens: Tensor, pos: Tensor, scales: Scales, selection: Selection
    ) -> tuple[Tensor, list[Tensor]]:
        """Update the chosen tokens.

        Returns:
            ``[B, S, C]``, the memory; and the chosen tokens ``[B, K, C]`` after each layer, of
            which the surplus ones are in no memory.
        """
        chosen = selection.tokens
        before, pos = gather_queries(tokens, chosen), gather_queries(pos, chosen)
        reference_points = gather_reference_points(scales, chosen)
        places = chosen[..., None].expand_as(before)
        query, memory, after = before, tokens, []
        for layer in self.layers:
            query = layer(query, pos, reference_points, memory, scales)
            kept = torch.where(selection.surplus, before, query).to(memory.dtype)
            memory = memory.scatter(1, places, kept)
            after.append(query)
        return memory, after


@dataclass(frozen=True, eq=False)
class SparseScales(ExtendedScales):
    """The geometry of tokens, and what a sparse encoder did with them.

    Attributes:
        selection: the tokens that it updated.
        after: the chosen tokens ``[B, K, C]`` after each layer.
    """

    selection: Selection
    after: list[Tensor]


class SparseTraining(Detector):
    """Base of detectors with a :class:`SparseEncoder`, before that of the detector.

    It adds the loss that teaches the encoder to choose those tokens that the decoder looks at (dam,
    section 3.3).
    """

    def encode(self, images: ImageList) -> tuple[Tensor, Scales]:
        """Encode images: memory ``[B, S, C]``, and its geometry, in training with the choice."""
        if not self.training:
            return super().encode(images)
        tokens, pos, scales = self.make_tokens(images)
        selection = self.encoder.select(tokens, pos, scales)
        memory, after = self.encoder.update(tokens, pos, scales, selection)
        return memory, SparseScales.extend(scales, selection=selection, after=after)

    def losses(
        self, memory: Tensor, scales: SparseScales, targets: list[Target], num_objects: Tensor
    ) -> dict[str, Tensor]:
        """Return the detector's losses and ``loss_mask_prediction``."""
        with record_decoder(self.decoder) as maps:
            losses = super().losses(memory, scales, targets, num_objects)
        looks = torch.stack(maps).sum(0)
        share = share_of_batch(targets, num_objects.clamp(min=1) / comm.get_world_size())
        return losses | {"loss_mask_prediction": share * selection_loss(looks, scales)}


def selection_loss(looks: Tensor, scales: SparseScales) -> Tensor:
    """Return the loss of scores against the tokens that a decoder looks at most.

    Args:
        looks: ``[B, S]``, the decoder's attention to each token.
        scales: with the selection, whose counts are those of the target.
    """
    selection, scores = scales.selection, scales.selection.scores
    if scales.padding_mask is not None:
        looks = looks.masked_fill(scales.padding_mask, looks.min() - 1)
    # There may be scores of the low-level tokens alone, which come first.
    best = looks[:, : scores.shape[1]].topk(selection.tokens.shape[1], dim=1).indices
    chosen = (~selection.surplus).squeeze(-1).to(scores.dtype)
    target = torch.zeros_like(scores).scatter(1, best, chosen)
    return F.multilabel_soft_margin_loss(scores, target)


@contextmanager
def record_decoder(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the attention map ``[B, S]`` of each deformable cross-attention that is called."""
    maps: list[Tensor] = []

    @torch.no_grad()
    def record(attention: DeformableAttention, args: tuple, output: Tensor) -> None:
        query, reference_points, memory, scales = args
        locations = attention.sampling_locations(query, reference_points, scales)
        weights = attention.point_weights(query, memory, locations, scales)
        maps.append(spread_attention(locations, weights, scales))

    hooks = [
        module.register_forward_hook(record)
        for module in decoder.modules()
        if isinstance(module, DeformableAttention)
    ]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def spread_attention(locations: Tensor, weights: Tensor, scales: Scales) -> Tensor:
    """Sum attention weights at the tokens around each sampling location.

    A weight is spread bilinearly over four cells, where cell ``i`` is at ``i`` and not, as for
    sampling, at ``i + 0.5``: so does the reference. What falls outside the map is lost.

    Args:
        locations: ``[B, Q, M, L, P, 2]``, see :meth:`DeformableAttention.sampling_locations`.
        weights: ``[B, Q, M, L, P]``
        scales: the geometry of the tokens.

    Returns:
        ``[B, S]``
    """
    looks = []
    for level, (height, width) in enumerate(scales.shapes):
        x, y = locations[:, :, :, level].flatten(1, -2).unbind(-1)
        x, y = x * width, y * height
        left, top = x.floor(), y.floor()
        weight = weights[:, :, :, level].flatten(1).to(x.dtype)
        level_looks = x.new_zeros(len(x), height * width)
        for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
            share = (1 - (x - column).abs()) * (1 - (y - row).abs())
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            cell = (row * width + column).long().masked_fill(~inside, 0)
            level_looks.scatter_add_(1, cell, (weight * share).masked_fill(~inside, 0.0))
        looks.append(level_looks)
    return torch.cat(looks, dim=1)
