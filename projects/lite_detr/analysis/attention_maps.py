"""Record where a detector's attentions look in a forward pass, and the weight of each place."""

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnknownPartError
from ..modeling.attention import DeformableAttention
from ..modeling.scales import Scales


class Samples(NamedTuple):
    """``K`` sampled places of an image, the heaviest first.

    Attributes:
        points: ``[K, 2]``, ``(x, y)`` in the image's ``[0, 1]`` frame.
        weights: ``[K]``, each a share of one query's attention in one head.
        levels: ``[K]`` int64, the sampled scales; the finest is 0.
    """

    points: Tensor
    weights: Tensor
    levels: Tensor


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """One call of one deformable attention.

    Attributes:
        name: of the module in the model, such as ``encoder.layers.2.self_attn``.
        locations: ``[B, Q, M, L, P, 2]``, ``(x, y)`` in the padded ``[0, 1]`` frame of each scale.
        weights: ``[B, Q, M, L, P]``, which sum to 1 over ``L * P``.
        reference_points: ``[B, Q, L, 2 or 4]``, where the queries look first, in the same frame.
        scales: the geometry of the batch.
        first_token: the index of the token that is the first query, if the queries are tokens, as
            in an encoder; the other queries are all tokens after it. None for other queries, as in
            a decoder.
    """

    name: str
    locations: Tensor
    weights: Tensor
    reference_points: Tensor
    scales: Scales
    first_token: int | None

    @property
    def query_levels(self) -> tuple[int, ...]:
        """The scales whose tokens are the queries; empty if the queries are not tokens."""
        if self.first_token is None:
            return ()
        levels = range(self.scales.num_levels)
        return tuple(level for level in levels if self.scales.start(level) >= self.first_token)

    def level_of(self, query: int) -> int | None:
        """Return the scale of the token that a query is; None if the queries are not tokens."""
        starts = [self.scales.start(level) for level in self.query_levels]
        if not starts:
            return None
        passed = sum(self.first_token + query >= start for start in starts)
        return self.query_levels[passed - 1]

    def point_of(self, query: int, image: int = 0) -> tuple[float, float]:
        """Return where a query looks first, ``(x, y)`` in its image's ``[0, 1]`` frame."""
        point = self.reference_points[image, query, 0, :2] / self.scales.valid_ratios[image, 0]
        return tuple(point.tolist())

    def nearest_query(self, point: tuple[float, float], image: int = 0) -> int:
        """Return the query that first looks nearest to a point of the image's ``[0, 1]`` frame.

        For an encoder, whose queries are tokens of several scales, this is one of the finest scale.
        """
        centers = self.reference_points[image, :, 0, :2]
        if self.query_levels:
            height, width = self.scales.shapes[self.query_levels[0]]
            centers = centers[: height * width]
        wanted = centers.new_tensor(point) * self.scales.valid_ratios[image, 0]
        # In cells, which are square.
        distances = ((centers - wanted) / self.scales.cell_sizes[0]).square().sum(-1)
        return int(distances.argmin())

    def strongest(
        self, count: int, image: int = 0, query: int | None = None, level: int | None = None
    ) -> Samples:
        """Return the samples of the highest weights, over all heads and points.

        Samples outside the image are omitted, as attention reads zeros there, and so are those of
        queries on padding.

        Args:
            count: the largest number of samples to return.
            image: index of the image in the batch.
            query: index of the query; None includes all.
            level: index of the scale; None includes all.
        """
        queries = slice(None) if query is None else slice(query, query + 1)
        levels = range(self.scales.num_levels) if level is None else [level]
        weights = self.weights[image, queries][:, :, levels]
        ratios = self.scales.valid_ratios[image, :, None]
        points = (self.locations[image, queries] / ratios)[:, :, levels]
        shown = ((points >= 0) & (points <= 1)).all(-1)
        if self.first_token is not None and self.scales.padding_mask is not None:
            padding = self.scales.padding_mask[image, self.first_token :][queries]
            shown &= ~padding[:, None, None, None]
        number = torch.as_tensor(levels, device=weights.device)[:, None].expand_as(weights)
        points, weights, number = points[shown], weights[shown], number[shown]
        weights, chosen = weights.topk(min(count, len(weights)))
        return Samples(points[chosen], weights, number[chosen])


@contextmanager
def record_attention(
    model: nn.Module, names: Collection[str] | None = None
) -> Iterator[list[AttentionMap]]:
    """Record what deformable attentions do inside the context.

        with record_attention(model, ["encoder.layers.5.self_attn"]) as maps:
            model(inputs)

    The forward pass stays as it is, fused kernels included: a hook gets the inputs of each
    attention and computes its locations and weights again, without gradients. So recording costs
    time and memory, for key-aware attention that of all sampled keys; name the attentions that you
    need. The hooks are removed at the end. Calls by other threads are not recorded.

    Args:
        model: a detector, or any module with deformable attentions.
        names: of the attentions, see :func:`attention_names`; None records all.

    Yields:
        A list that gets one map per call of an attention, in order, on the model's device.

    Raises:
        UnknownPartError: the model has no attention of a given name.
    """
    attentions = find_attentions(model)
    names = list(attentions) if names is None else names
    unknown = [name for name in names if name not in attentions]
    if unknown:
        raise UnknownPartError(
            f"no deformable attention is named {', '.join(unknown)}; there are "
            f"{', '.join(attentions) or 'none'}"
        )
    maps: list[AttentionMap] = []
    recording_thread = threading.get_ident()

    def hook_for(name: str):
        def hook(module: DeformableAttention, inputs: tuple, output: Tensor) -> None:
            if threading.get_ident() == recording_thread:
                maps.append(make_map(name, module, *inputs))

        return hook

    handles = [attentions[name].register_forward_hook(hook_for(name)) for name in names]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def attention_names(model: nn.Module, part: str = "") -> list[str]:
    """Return the names of a model's deformable attentions, first layer to last.

    Args:
        model: a detector, or any module with deformable attentions.
        part: what the names start with, such as ``encoder`` or ``decoder``; empty returns all.
    """
    return [name for name in find_attentions(model) if name.startswith(part)]


def find_attentions(model: nn.Module) -> dict[str, DeformableAttention]:
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, DeformableAttention)}


@torch.no_grad()
def make_map(
    name: str,
    module: DeformableAttention,
    query: Tensor,
    reference_points: Tensor,
    memory: Tensor,
    scales: Scales,
) -> AttentionMap:
    """Return the map of an attention, from the inputs of its forward pass."""
    locations = module.sampling_locations(query, reference_points, scales)
    return AttentionMap(
        name=name,
        locations=locations,
        weights=module.point_weights(query, memory, locations, scales),
        reference_points=reference_points.detach(),
        scales=scales,
        first_token=first_token(reference_points, scales),
    )


def first_token(reference_points: Tensor, scales: Scales) -> int | None:
    """Return the first token that is a query; such queries look first at their own centres."""
    first = scales.num_tokens - reference_points.shape[1]
    if first < 0 or not torch.equal(reference_points, scales.reference_points[:, first:]):
        return None
    return first
