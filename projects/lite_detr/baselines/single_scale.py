"""The parts that detectors with one feature map share: data flow, neck, dense attention, DC5."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.layers import CNNBlockBase
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import ResNet
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..modeling.criterion import Target
from ..modeling.detector import Detector
from ..modeling.heads import by_layer
from ..modeling.neck import MultiScaleNeck
from ..modeling.scales import Scales


@dataclass(frozen=True, eq=False)
class ExtendedScales(Scales):
    """The geometry of tokens, and what an encoder tells the decoder beside them."""

    @classmethod
    def extend(cls, scales: Scales, **added) -> "ExtendedScales":
        """Return the same geometry with the fields that a subclass adds."""
        return cls(**(vars(scales) | added))


@dataclass(frozen=True, eq=False)
class LocatedScales(ExtendedScales):
    """The geometry of one map, and where its tokens are.

    Attributes:
        pos: ``[B, S, C]``, position encodings, which dense cross-attention adds to its keys.
    """

    pos: Tensor


class SingleScaleDetector(Detector):
    """Base of the detectors whose tokens are the cells of the backbone's last map.

    Args:
        in_features: the name of the map in a list; None selects the backbone's last one.
        num_levels: 1, which configs of all detectors give.
        **detector: see :class:`Detector`.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: Sequence[str] | None = None,
        embed_dim: int = 256,
        num_levels: int = 1,
        **detector,
    ):
        in_features = in_features or list(backbone.output_shape())[-1:]
        super().__init__(
            backbone=backbone,
            in_features=in_features,
            embed_dim=embed_dim,
            num_levels=num_levels,
            **detector,
        )
        self.neck = self.build_neck(in_features, embed_dim)
        # There are no levels to tell apart; adding zeros changes nothing.
        del self.level_embed
        self.register_buffer("level_embed", torch.zeros(1, embed_dim), persistent=False)

    def build_neck(self, in_features: Sequence[str], embed_dim: int) -> MultiScaleNeck:
        """Return the part that projects the map to ``embed_dim`` channels."""
        return PlainNeck(self.backbone.output_shape(), in_features, embed_dim, len(in_features))

    def locate_tokens(self, maps: list[Tensor], images: ImageList) -> tuple[Tensor, Scales]:
        """Return position encodings ``[B, S, C]``, and the geometry that holds them as well."""
        pos, scales = super().locate_tokens(maps, images)
        return pos, LocatedScales.extend(scales, pos=pos)

    def losses(
        self, memory: Tensor, scales: Scales, targets: list[Target], num_objects: Tensor
    ) -> dict[str, Tensor]:
        """Return ``loss_ce``, ``loss_bbox`` and ``loss_giou``.

        Those of earlier layers end in ``_0``, ``_1`` and so on.
        """
        queries, _ = self.queries(memory, scales)
        outputs = by_layer(self.decoder(queries, memory, scales))
        return self.criterion(outputs, targets, num_objects)


class PlainNeck(MultiScaleNeck):
    """DETR's neck: 1x1 convolutions without a norm, which start as PyTorch's do."""

    def __init__(self, *args):
        super().__init__(*args)
        for index, (convolution, _) in enumerate(self.lateral_convs):
            convolution.reset_parameters()
            self.lateral_convs[index] = convolution


class DenseAttention(nn.Module):
    """Base of the attentions of all queries to all tokens, in place of a deformable one.

    The arguments of :meth:`forward` are those of :class:`DeformableAttention`, so that layers can
    have either.

    Args:
        embed_dim: channels ``C``, a multiple of ``num_heads``.
        num_heads: the number of heads.
        dropout: probability of zeroing a weight in training.
    """

    def __init__(self, embed_dim: int = 256, num_heads: int = 8, dropout: float = 0.1):
        super().__init__()
        self.attention = nn.MultiheadAttention(embed_dim, num_heads, dropout, batch_first=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.attention.in_proj_weight, self.attention.out_proj.weight):
            nn.init.xavier_uniform_(weight)
        for bias in (self.attention.in_proj_bias, self.attention.out_proj.bias):
            nn.init.zeros_(bias)

    @property
    def num_heads(self) -> int:
        return self.attention.num_heads

    @property
    def output_proj(self) -> nn.Linear:
        return self.attention.out_proj

    def key(self, query: Tensor, memory: Tensor, scales: LocatedScales) -> Tensor:
        """Return the keys ``[B, S, C]``."""
        raise NotImplementedError(f"{type(self).__name__} must define `key`")

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor | None,
        memory: Tensor,
        scales: LocatedScales,
    ) -> Tensor:
        """
        Args:
            query: ``[B, Q, C]``, content and position.
            reference_points: not used.
            memory: ``[B, S, C]``, the values.
            scales: the positions of the values, and their padding, which nothing attends to.

        Returns:
            ``[B, Q, C]``
        """
        attended, _ = self.attention(
            query,
            self.key(query, memory, scales),
            memory,
            key_padding_mask=scales.padding_mask,
            need_weights=False,
        )
        return attended


class DenseSelfAttention(DenseAttention):
    """Attention of tokens to each other: the keys are the queries."""

    def key(self, query: Tensor, memory: Tensor, scales: LocatedScales) -> Tensor:
        return query


class DenseCrossAttention(DenseAttention):
    """Attention of queries to tokens: the keys are content and position of the tokens."""

    def key(self, query: Tensor, memory: Tensor, scales: LocatedScales) -> Tensor:
        return memory + scales.pos


def dilated_stages(**options) -> list[list[CNNBlockBase]]:
    """Return the stages of a ResNet whose last one has stride 1 and dilation 2 (DC5).

    As in torchvision and the references, the convolutions of that stage's first block are not
    dilated, those of the others are.

    Args:
        **options: see Detectron2's ``ResNet.make_default_stages``.
    """
    stages = ResNet.make_default_stages(**options)
    first, *others = stages[-1]
    first.stride = 1
    for module in first.modules():
        if hasattr(module, "kernel_size"):
            module.stride = (1, 1)
    for block in others:
        for module in block.modules():
            if hasattr(module, "kernel_size") and module.kernel_size == (3, 3):
                module.dilation = module.padding = (2, 2)
    return stages
