"""Deformable and key-aware deformable attention over multi-scale tokens."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops import fused_key_aware_ms_deform_attn, fused_ms_deform_attn, key_aware_weights
from ..ops.native import autocast
from ..ops.sampling import locate_points
from .scales import Scales


class DeformableAttention(nn.Module):
    """Base of both attentions: the sampling locations, and the projections around them.

    Each query attends, in each of ``M`` heads, to ``P`` points on each of ``L`` scales, at offsets
    from its reference that are linear in the query. A subclass defines how points are weighted.

    Args:
        embed_dim: channels ``C``, a multiple of ``num_heads``.
        num_heads: ``M``
        num_levels: ``L``
        num_points: ``P``, for each head and scale.

    Attributes:
        operator: samples and sums up; one of the fused forms of :mod:`lite_detr.ops`.

    Raises:
        ConfigError: ``embed_dim`` is not a multiple of ``num_heads``.
    """

    operator: Callable

    def __init__(
        self, embed_dim: int = 256, num_heads: int = 8, num_levels: int = 4, num_points: int = 4
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ConfigError(
                f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
            )
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * num_levels * num_points * 2)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)

    def reset_parameters(self) -> None:
        """Initialise as Deformable DETR does (appendix A.4.2).

        Head ``m`` first looks in direction ``2 pi m / M``, point ``p`` at ``p + 1`` cells.
        """
        angles = torch.arange(self.num_heads, dtype=torch.float64) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions /= directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float64)
        offsets = directions[:, None, None, :] * steps[:, None]
        offsets = offsets.expand(-1, self.num_levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        for projection in (self.value_proj, self.output_proj):
            reset_projection(projection)

    def forward(
        self, query: Tensor, reference_points: Tensor, memory: Tensor, scales: Scales
    ) -> Tensor:
        """
        Args:
            query: ``[B, Q, C]``, content and position.
            reference_points: ``[B, Q, L, 2]`` points or ``[B, Q, L, 4]`` boxes (cx, cy, w, h), in
                the padded ``[0, 1]`` frame of each scale.
            memory: ``[B, S, C]``, the tokens of all scales.
            scales: their geometry and padding.

        Returns:
            ``[B, Q, C]``
        """
        # Linear layers keep their input for the backward pass: two of them keep one cast query.
        (query,) = autocast(query.device, query)
        return self.output_proj(self.attend(query, reference_points, memory, scales))

    def attend(
        self, query: Tensor, reference_points: Tensor, memory: Tensor, scales: Scales
    ) -> Tensor:
        """Sum ``memory`` around the reference points, weighted: ``[B, Q, C]``."""
        raise NotImplementedError(f"{type(self).__name__} must define `attend`")

    def point_weights(
        self, query: Tensor, memory: Tensor, locations: Tensor, scales: Scales
    ) -> Tensor:
        """Return the weights ``[B, Q, M, L, P]`` of :meth:`attend`, a softmax over ``L * P``."""
        raise NotImplementedError(f"{type(self).__name__} must define `point_weights`")

    def offsets(self, query: Tensor) -> Tensor:
        """Return the offsets from the reference points, ``[B, Q, M, L, P, 2]``."""
        offsets = self.sampling_offsets(query)
        return offsets.unflatten(-1, (self.num_heads, self.num_levels, self.num_points, 2))

    def sampling_locations(self, query: Tensor, reference_points: Tensor, scales: Scales) -> Tensor:
        """Return where queries sample: ``[B, Q, M, L, P, 2]`` in the padded frame of each scale."""
        return locate_points(reference_points, self.offsets(query), scales.cell_sizes)

    def project(self, projection: nn.Linear, memory: Tensor, scales: Scales) -> Tensor:
        """``[B, S, C]`` -> ``[B, S, M, D]``, zero on padding as outside the maps."""
        projected = projection(memory)
        if scales.padding_mask is not None:
            projected = projected.masked_fill_(scales.padding_mask[..., None], 0.0)
        return projected.unflatten(-1, (self.num_heads, -1))


class MultiScaleDeformableAttention(DeformableAttention):
    """Weights regressed from the query (Deformable DETR, arXiv 2010.04159, section 4.1)."""

    operator = staticmethod(fused_ms_deform_attn)

    def __init__(
        self, embed_dim: int = 256, num_heads: int = 8, num_levels: int = 4, num_points: int = 4
    ):
        super().__init__(embed_dim, num_heads, num_levels, num_points)
        self.attention_weights = nn.Linear(embed_dim, num_heads * num_levels * num_points)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)

    def attend(
        self, query: Tensor, reference_points: Tensor, memory: Tensor, scales: Scales
    ) -> Tensor:
        return self.operator(
            self.project(self.value_proj, memory, scales),
            scales.shapes,
            reference_points,
            self.offsets(query),
            self.logits(query),
        )

    def logits(self, query: Tensor) -> Tensor:
        """Return the logits of the points' weights, ``[B, Q, M, L, P]``."""
        logits = self.attention_weights(query)
        return logits.unflatten(-1, (self.num_heads, self.num_levels, self.num_points))

    def point_weights(
        self, query: Tensor, memory: Tensor, locations: Tensor, scales: Scales
    ) -> Tensor:
        logits = self.logits(query)
        return logits.flatten(-2).softmax(-1).view_as(logits)


class KeyAwareDeformableAttention(DeformableAttention):
    """Weights from query x sampled keys (Lite DETR, arXiv 2303.07335, section 3.4, KDA).

    Args:
        embed_dim, num_heads, num_levels, num_points: see :class:`DeformableAttention`.
        key_proj: True gives keys a projection of their own; False uses the values as keys, as the
            released models do.
        random_queries: True draws the queries' projection at random, as the released code does;
            False starts it at zero, which weighs all points alike, as plain attention does.
    """

    operator = staticmethod(fused_key_aware_ms_deform_attn)

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        key_proj: bool = False,
        random_queries: bool = False,
    ):
        super().__init__(embed_dim, num_heads, num_levels, num_points)
        self.random_queries = random_queries
        self.query_proj = nn.Linear(embed_dim, embed_dim)
        self.key_proj = nn.Linear(embed_dim, embed_dim) if key_proj else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.random_queries:
            # They weigh points by chance, and training starts slowly (docs/get_started.md).
            reset_projection(self.query_proj)
        else:
            nn.init.zeros_(self.query_proj.weight)
            nn.init.zeros_(self.query_proj.bias)
        if self.key_proj is not None:
            reset_projection(self.key_proj)

    def attend(
        self, query: Tensor, reference_points: Tensor, memory: Tensor, scales: Scales
    ) -> Tensor:
        value = self.project(self.value_proj, memory, scales)
        key = value if self.key_proj is None else self.project(self.key_proj, memory, scales)
        return self.operator(
            self.query_proj(query).unflatten(-1, (self.num_heads, -1)),
            key,
            value,
            scales.shapes,
            reference_points,
            self.offsets(query),
        )

    def point_weights(
        self, query: Tensor, memory: Tensor, locations: Tensor, scales: Scales
    ) -> Tensor:
        projection = self.value_proj if self.key_proj is None else self.key_proj
        return key_aware_weights(
            self.query_proj(query).unflatten(-1, (self.num_heads, -1)),
            self.project(projection, memory, scales),
            scales.spatial_shapes,
            scales.level_start_index,
            locations,
        )


def reset_projection(projection: nn.Linear) -> None:
    nn.init.xavier_uniform_(projection.weight)
    nn.init.zeros_(projection.bias)
