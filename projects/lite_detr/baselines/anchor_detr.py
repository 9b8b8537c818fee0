"""Anchor DETR: the meta-architecture, its anchor points and row-column decoupled attention."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..modeling.decoder import DecoderLayer
from ..modeling.detector import padding_masks
from ..modeling.encoder import EncoderLayer
from ..modeling.layers import MLP, sine_embedding
from ..modeling.neck import MultiScaleNeck
from ..modeling.queries import Queries
from ..modeling.scales import Scales
from .single_scale import LocatedScales, SingleScaleDetector


@META_ARCH_REGISTRY.register()
class AnchorDETR(SingleScaleDetector):
    """Anchor DETR (arXiv 2109.07107): queries are points with patterns; attention by axes.

    Its position encoding is an :class:`AxisEncoding`. The arguments are those of
    :class:`SingleScaleDetector`.
    """

    lazy_config = "common/models/anchor_detr.py"

    @configurable
    def __init__(self, **detector):
        super().__init__(**detector)

    def build_neck(self, in_features: Sequence[str], embed_dim: int) -> MultiScaleNeck:
        """Return a neck with a group normalisation, unlike DETR's."""
        return MultiScaleNeck(self.backbone.output_shape(), in_features, embed_dim, 1)

    def locate_tokens(self, maps: list[Tensor], images: ImageList) -> tuple[Tensor, Scales]:
        """Return codes ``[B, W + H, C]`` of the map's columns and rows, and its geometry."""
        dtype = maps[0].dtype
        masks, padded = padding_masks(images, [maps[0].shape[-2:]])
        exact = dtype if dtype == torch.float64 else torch.float32
        scales = Scales.from_masks(masks, padded, exact)
        axes = torch.cat([places(masks[0][:, 0], exact), places(masks[0][:, :, 0], exact)], dim=1)
        codes = self.position_encoding.encode_axis(axes)
        return codes, AxisScales.extend(scales, pos=codes, encoding=self.position_encoding)


@dataclass(frozen=True, eq=False)
class AxisScales(LocatedScales):
    """The geometry of one map, and codes of its columns and rows in ``pos [B, W + H, C]``.

    Attributes:
        encoding: encodes other places like these.
    """

    encoding: "AxisEncoding"

    def split_codes(self) -> tuple[Tensor, Tensor]:
        """Return the codes of the columns ``[B, W, C]`` and of the rows ``[B, H, C]``."""
        width = self.shapes[0][1]
        return self.pos[:, :width], self.pos[:, width:]


def places(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return centres of cells along an axis, as shares of its part without padding.

    Args:
        mask: ``[B, N]`` bool, True on padding, which repeats the last centre before it.
        dtype: of the result.
    """
    count = (~mask).cumsum(1, dtype=dtype)
    return (count - 0.5) / count[:, -1:]


class AxisEncoding(nn.Module):
    """Encode places along one axis, and points, with an MLP each (section 3.2).

    Args:
        embed_dim: channels ``C``.
    """

    def __init__(self, embed_dim: int = 256):
        super().__init__()
        self.embed_dim = embed_dim
        self.axis_mlp = MLP(embed_dim, embed_dim, embed_dim, num_layers=2)
        self.point_mlp = MLP(embed_dim, embed_dim, embed_dim, num_layers=2)

    def encode_axis(self, places: Tensor) -> Tensor:
        """``[...]`` in 0 to 1 -> ``[..., C]``"""
        codes = sine_embedding(places * 2 * math.pi, self.embed_dim, 10000.0)
        return self.axis_mlp(codes.to(self.axis_mlp[0].weight.dtype))

    def encode_points(self, points: Tensor) -> Tensor:
        """``[..., 2]`` as (x, y) -> ``[..., C]``"""
        # The released weights expect y before x.
        codes = sine_embedding(points[..., [1, 0]] * 2 * math.pi, self.embed_dim // 2, 10000.0)
        return self.point_mlp(codes.flatten(-2).to(self.point_mlp[0].weight.dtype))


class AnchorPoints(nn.Module):
    """Learned points, each of which is a query with each of some patterns (section 3.3).

    Args:
        embed_dim: channels ``C``.
        num_queries: the number of points.
        num_patterns: the number of patterns.
    """

    def __init__(self, embed_dim: int = 256, num_queries: int = 300, num_patterns: int = 3):
        super().__init__()
        self.patterns = nn.Embedding(num_patterns, embed_dim)
        self.points = nn.Embedding(num_queries, 2)
        nn.init.uniform_(self.points.weight)

    def forward(self, memory: Tensor, scales: AxisScales) -> tuple[Queries, None]:
        """Return the queries, pattern by pattern, and no proposals.

        Their positions ``[B, Q, 3 * C]`` are the codes of the points and of their x and y. Of
        ``memory [B, S, C]`` only ``B`` matters.
        """
        points = self.points.weight.to(scales.centers.dtype)
        axes = scales.encoding.encode_axis(points).flatten(-2)
        pos = torch.cat([scales.encoding.encode_points(points), axes], dim=-1)
        count = self.patterns.num_embeddings
        content = self.patterns.weight.repeat_interleave(len(points), dim=0)
        content, pos, points = (
            part.expand(memory.shape[0], -1, -1)
            for part in (content, pos.repeat(count, 1), points.repeat(count, 1))
        )
        return Queries(content, pos, points), None


class RowColumnAttention(nn.Module):
    """Row-column decoupled attention (RCDA, section 3.4).

    A query attends to the columns of the map by their mean features, and to the rows; a cell's
    weight is the product of its column's and its row's.

    Args:
        embed_dim: channels ``C``, a multiple of ``num_heads``.
        num_heads: ``M``
        dropout: probability of zeroing a weight in training.
    """

    def __init__(self, embed_dim: int = 256, num_heads: int = 8, dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        # Queries for columns and for rows, keys for both, values.
        self.in_proj = nn.Linear(embed_dim, 5 * embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj.weight)
        for linear in (self.in_proj, self.output_proj):
            nn.init.zeros_(linear.bias)

    def forward(
        self, query_x: Tensor, query_y: Tensor, memory: Tensor, scales: AxisScales
    ) -> Tensor:
        """
        Args:
            query_x: ``[B, Q, C]``, content and code of x.
            query_y: ``[B, Q, C]``, content and code of y.
            memory: ``[B, S, C]``, the map's tokens.
            scales: its geometry, padding and codes.

        Returns:
            ``[B, Q, C]``
        """
        (height, width), mask = scales.shapes[0], scales.padding_mask
        columns, rows = scales.split_codes()
        cells = memory.unflatten(1, (height, width))
        if mask is not None:
            mask = mask.unflatten(1, (height, width))
        weights = zip(self.in_proj.weight.chunk(5), self.in_proj.bias.chunk(5))
        # As in the reference, padding counts in the means.
        query_x, query_y, key_x, key_y, value = (
            F.linear(tokens, weight, bias).unflatten(-1, (self.num_heads, -1))
            for tokens, (weight, bias) in zip(
                (query_x, query_y, cells.mean(1) + columns, cells.mean(2) + rows, cells), weights
            )
        )
        along_x = self.attend(query_x, key_x, None if mask is None else mask[:, 0])
        along_y = self.attend(query_y, key_y, None if mask is None else mask[:, :, 0])
        value = value.permute(0, 3, 2, 1, 4)  # [B, M, W, H, D]
        by_row = (along_x @ value.flatten(-2)).unflatten(-1, value.shape[-2:])  # [B, M, Q, H, D]
        attended = (along_y[..., None, :] @ by_row).squeeze(-2)
        return self.output_proj(attended.transpose(1, 2).flatten(2))

    def attend(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, Q, M, D]``, ``[B, N, M, D]`` and padding ``[B, N]`` -> weights ``[B, M, Q, N]``"""
        query = query * query.shape[-1] ** -0.5
        logits = query.transpose(1, 2) @ key.permute(0, 2, 3, 1)
        if mask is not None:
            logits = logits.masked_fill(mask[:, None, None], float("-inf"))
        return F.dropout(logits.softmax(-1), self.dropout, self.training).to(query.dtype)


class AxisEncoderLayer(EncoderLayer):
    """An encoder layer with a :class:`RowColumnAttention`."""

    def attend(
        self,
        query: Tensor,
        pos: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        scales: AxisScales,
    ) -> Tensor:
        """Apply the attention half of the layer to all tokens, see :meth:`EncoderLayer.attend`."""
        columns, rows = scales.split_codes()
        cells = query.unflatten(1, scales.shapes[0])
        query_x, query_y = cells + columns[:, None], cells + rows[:, :, None]
        attended = self.self_attn(query_x.flatten(1, 2), query_y.flatten(1, 2), memory, scales)
        return self.norm(query + self.dropout(attended))


class AxisDecoderLayer(DecoderLayer):
    """A decoder layer with a :class:`RowColumnAttention` to the memory."""

    def forward(
        self,
        content: Tensor,
        pos: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        scales: AxisScales,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Apply the layer, see :meth:`DecoderLayer.forward`; ``pos`` is ``[B, Q, 3 * C]``."""
        pos, x, y = pos.chunk(3, dim=-1)
        query = content + pos
        attended, _ = self.self_attn(query, query, content, attn_mask=attn_mask, need_weights=False)
        content = self.self_attn_norm(content + self.dropout(attended))
        attended = self.cross_attn(content + x, content + y, memory, scales)
        content = self.cross_attn_norm(content + self.dropout(attended))
        return self.ffn(content)
