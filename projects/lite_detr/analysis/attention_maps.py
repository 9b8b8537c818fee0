"""Where the attentions of a detector look in a forward pass, and how much each place counts."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..modeling.attention import DeformableAttention
from ..modeling.scales import Scales


class UnknownAttention(LookupError):
    """A model has no such deformable attention; the message names those that it has."""


class Samples(NamedTuple):
    """``K`` sampled places of an image, the heaviest first.

    Attributes:
        points: ``[K, 2]``, ``(x, y)`` in the image's ``[0, 1]`` frame.
        weights: ``[K]``, each a share of what one query takes in one head.
        levels: ``[K]`` int64, the scale that is sampled, the finest is 0.
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
        first_token: where the queries are tokens, as in an encoder, the number of the first one;
            they are all tokens from there on. None where they are others, as in a decoder.
    """

    name: str
    locations: Tensor
    weights: Tensor
    reference_points: Tensor
    scales: Scales
    first_token: int | None

    @property
    def query_levels(self) -> tuple[int, ...]:
        """The scales whose tokens are the queries; none where the queries are no tokens."""
        if self.first_token is None:
            return ()
        levels = range(self.scales.num_levels)
        return tuple(level for level in levels if self.scales.start(level) >= self.first_token)

    def level_of(self, query: int) -> int | None:
        """The scale that a query is a token of; None where the queries are no tokens."""
        starts = [self.scales.start(level) for level in self.query_levels]
        if not starts:
            return None
        passed = sum(self.first_token + query >= start for start in starts)
        return self.query_levels[passed - 1]

    def point_of(self, query: int, image: int = 0) -> tuple[float, float]:
        """Where a query looks first, ``(x, y)`` in its image's ``[0, 1]`` frame."""
        point = self.reference_points[image, query, 0, :2] / self.scales.valid_ratios[image, 0]
        return tuple(point.tolist())

    def nearest_query(self, point: tuple[float, float], image: int = 0) -> int:
        """The query that looks first at what is nearest to a point of the image's ``[0, 1]`` frame.

        Of an encoder's queries, which are tokens of several scales, one of the finest scale.
        """
        centers = self.reference_points[image, :, 0, :2]
        if self.query_levels:
            height, width = self.scales.shapes[self.query_levels[0]]
            centers = centers[: height * width]
        wanted = centers.new_tensor(point) * self.scales.valid_ratios[image, 0]
        # In cells, whose sides are equally long.
        distances = ((centers - wanted) / self.scales.cell_sizes[0]).square().sum(-1)
        return int(distances.argmin())

    def strongest(
        self, count: int, image: int = 0, query: int | None = None, level: int | None = None
    ) -> Samples:
        """The heaviest samples over all heads and points.

        What lies outside the image is left out, as attention reads zeros there, and so are queries
        that are padding.

        Args:
            count: at most so many.
            image: of the batch.
            query: of which query; None takes those of all.
            level: on which scale; None takes those on all.
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
    """Records what deformable attentions do while the context lasts.

        with record_attention(model, ["encoder.layers.5.self_attn"]) as maps:
            model(inputs)

    The forward pass stays as it is, fused kernels included: a hook takes the inputs of each
    attention and makes locations and weights of them once more, without gradients. So recording
    takes time and memory, for key-aware attention that of all sampled keys; name the attentions
    that are wanted. Afterwards the hooks are gone.

    Args:
        model: a detector, or any module with deformable attentions.
        names: of the attentions, see :func:`attention_names`; None records all.

    Yields:
        A list that grows by a map with each call, in the order of the calls, on the model's device.

    Raises:
        UnknownAttention: the model has no attention of a given name.
    """
    attentions = find_attentions(model)
    names = list(attentions) if names is None else names
    unknown = [name for name in names if name not in attentions]
    if unknown:
        raise UnknownAttention(
            f"no deformable attention is named {', '.join(unknown)}; there are "
            f"{', '.join(attentions) or 'none'}"
        )
    maps: list[AttentionMap] = []

    def hook_for(name: str):
        def hook(module: DeformableAttention, inputs: tuple, output: Tensor) -> None:
            maps.append(make_map(name, module, *inputs))

        return hook

    handles = [attentions[name].register_forward_hook(hook_for(name)) for name in names]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def attention_names(model: nn.Module, part: str = "") -> list[str]:
    """The deformable attentions of a model, first layer to last.

    Args:
        model: a detector, or any module with deformable attentions.
        part: names begin with it, ``encoder`` or ``decoder``; empty gives all.
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
    """What an attention does with the inputs of its forward pass."""
    locations = module.sampling_locations(query, reference_points, scales)
    return AttentionMap(
        name=name,
        locations=locations,
        weights=module.weigh(query, memory, locations, scales),
        reference_points=reference_points.detach(),
        scales=scales,
        first_token=first_token(reference_points, scales),
    )


def first_token(reference_points: Tensor, scales: Scales) -> int | None:
    """From which token on tokens are the queries: those look first at their own centres."""
    first = scales.num_tokens - reference_points.shape[1]
    if first < 0 or not torch.equal(reference_points, scales.reference_points[:, first:]):
        return None
    return first
