"""The attention modules of other projects, and ours in the same form.

Constructors, names of parameters and ``forward`` are theirs, so checkpoints load and code that
calls them stays as it is; the sampling is that of :mod:`lite_detr.ops`.
"""

from typing import Any

from torch import Tensor, nn

from ..errors import LevelsError
from ..modeling import attention
from ..modeling.attention import DeformableAttention
from .levels import exact_dtype, make_levels


class ReferenceForward(DeformableAttention):
    """An attention of ours with the ``forward`` of Deformable-DETR's ``MSDeformAttn``."""

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Any,
        input_level_start_index: Any = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            query: ``[B, Q, C]``, content and position.
            reference_points: ``[B, Q, L, 2]`` points or ``[B, Q, L, 4]`` boxes (cx, cy, w, h), in
                ``[0, 1]`` including padding.
            input_flatten: ``[B, S, C]``, the tokens of all levels.
            input_spatial_shapes: ``[L, 2]``, ``(H_l, W_l)``: a tensor of any integer dtype or a
                list.
            input_level_start_index: not used, as it follows from the shapes.
            input_padding_mask: ``[B, S]``, true on padding.

        Returns:
            ``[B, Q, C]``

        Raises:
            LevelsError: number or sizes of the levels do not fit the module, the tokens, the mask
                or the reference points.
        """
        levels = make_levels(
            input_spatial_shapes, input_flatten, input_padding_mask, self.num_levels
        )
        if reference_points.shape[-2] != self.num_levels:
            raise LevelsError(
                f"reference_points must be [B, Q, {self.num_levels}, 2 or 4], a point or a box for "
                f"each level, got {tuple(reference_points.shape)}"
            )
        reference_points = reference_points.to(exact_dtype(input_flatten.dtype))
        return super().forward(query, reference_points, input_flatten, levels)


class MSDeformAttn(ReferenceForward, attention.MultiScaleDeformableAttention):
    """``MSDeformAttn`` of Deformable-DETR, DINO, H-DETR, Mask2Former and Mask DINO.

    Args:
        d_model: channels ``C``.
        n_levels: ``L``
        n_heads: ``M``
        n_points: ``P``, for each head and level.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4):
        super().__init__(d_model, n_heads, n_levels, n_points)
        order_as_theirs(self)
        self.d_model, self.n_levels = d_model, n_levels
        self.n_heads, self.n_points = n_heads, n_points

    def _reset_parameters(self) -> None:
        """The name that the models call it by."""
        self.reset_parameters()


class KeyAwareDeformableAttention(ReferenceForward, attention.KeyAwareDeformableAttention):
    """Lite DETR's attention, to take the place of an ``MSDeformAttn`` in a model.

    Arguments are those of :class:`lite_detr.modeling.KeyAwareDeformableAttention`.
    """

    def _reset_parameters(self) -> None:
        """The name that the models call it by."""
        self.reset_parameters()


class _SequenceForward(attention.MultiScaleDeformableAttention):
    """The ``forward`` that detrex and MMCV share: residual and dropout are inside."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        dropout: float,
        batch_first: bool,
    ):
        super().__init__(embed_dim, num_heads, num_levels, num_points)
        order_as_theirs(self)
        self.dropout = nn.Dropout(dropout)
        self.batch_first = batch_first

    def init_weights(self) -> None:
        """The name that their models call it by."""
        self.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Any = None,
        level_start_index: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """
        Args:
            query: ``[Q, B, C]``, or ``[B, Q, C]`` if ``batch_first``.
            key: not used.
            value: ``[S, B, C]`` or ``[B, S, C]``, the tokens of all levels; None takes the query.
            identity: what the output is added to; None takes the query without its position.
            query_pos: added to the query.
            key_padding_mask: ``[B, S]``, true on padding.
            reference_points: ``[B, Q, L, 2]`` points or ``[B, Q, L, 4]`` boxes (cx, cy, w, h).
            spatial_shapes: ``[L, 2]``, ``(H_l, W_l)``: a tensor of any integer dtype or a list.
            level_start_index: not used, as it follows from the shapes.
            **kwargs: not used.

        Returns:
            As the query.

        Raises:
            LevelsError: number or sizes of the levels do not fit the module, the tokens or the
                mask.
        """
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        levels = make_levels(spatial_shapes, value, key_padding_mask, self.num_levels)
        reference_points = reference_points.to(exact_dtype(value.dtype))
        output = super().forward(query, reference_points, value, levels)
        if not self.batch_first:
            output = output.transpose(0, 1)
        return self.dropout(output) + identity


class DetrexDeformableAttention(_SequenceForward):
    """``detrex.layers.MultiScaleDeformableAttention``.

    Args:
        embed_dim: channels ``C``.
        num_heads, num_levels, num_points: ``M``, ``L`` and ``P``.
        img2col_step: has no effect.
        dropout: probability of zeroing an output in training.
        batch_first: whether sequences are ``[B, N, C]``.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        img2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
    ):
        super().__init__(embed_dim, num_heads, num_levels, num_points, dropout, batch_first)
        self.embed_dim, self.im2col_step = embed_dim, img2col_step


class MMCVDeformableAttention(_SequenceForward):
    """``mmcv.ops.MultiScaleDeformableAttention``.

    Args:
        embed_dims: channels ``C``.
        num_heads, num_levels, num_points: ``M``, ``L`` and ``P``.
        im2col_step: has no effect.
        dropout: probability of zeroing an output in training.
        batch_first: whether sequences are ``[B, N, C]``.
        norm_cfg, init_cfg: kept, as MMCV's does, and not used.
        value_proj_ratio: the ratio of the values' channels to ``C``.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: dict | None = None,
        init_cfg: dict | None = None,
        value_proj_ratio: float = 1.0,
    ):
        super().__init__(embed_dims, num_heads, num_levels, num_points, dropout, batch_first)
        self.embed_dims, self.im2col_step = embed_dims, im2col_step
        self.norm_cfg, self.init_cfg = norm_cfg, init_cfg
        if value_proj_ratio != 1.0:
            width = int(embed_dims * value_proj_ratio)
            self.value_proj = nn.Linear(embed_dims, width)
            self.output_proj = nn.Linear(width, embed_dims)
            self.reset_parameters()


def order_as_theirs(module: attention.MultiScaleDeformableAttention) -> None:
    """Put parameters in the references' order, by which optimizers number their states."""
    for name in ("value_proj", "output_proj"):
        projection = getattr(module, name)
        delattr(module, name)
        setattr(module, name, projection)
