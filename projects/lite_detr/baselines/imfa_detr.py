"""IMFA on DAB-DETR: the meta-architecture, and the sampling of features around likely objects."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..modeling.criterion import Target
from ..modeling.detector import Detector, padding_masks
from ..modeling.encoder import EncoderLayer
from ..modeling.heads import Predictions, by_layer
from ..modeling.layers import MLP, sine_embedding
from ..modeling.neck import extract_maps
from ..modeling.queries import gather_queries
from ..modeling.scales import Scales
from .dab_detr import AnchorDecoder, ScaledEncoder
from .single_scale import LocatedScales, PlainNeck


@dataclass(frozen=True, eq=False)
class PyramidScales(LocatedScales):
    """The geometry of the coarsest map, and how much of each map an image covers.

    Attributes:
        map_ratios: ``[B, L, 2]``, the ``(x, y)`` share of each map, finest first.
    """

    map_ratios: Tensor


@dataclass(frozen=True, eq=False)
class DecodedScales(PyramidScales):
    """The geometry of the coarsest map, and the queries, which are decoded with the encoder.

    Attributes:
        states: of each layer, the queries ``[B, Q, C]`` after it and the anchors ``[B, Q, 4]`` that
            its boxes start from.
    """

    states: list[tuple[Tensor, Tensor]]


@META_ARCH_REGISTRY.register()
class IMFADETR(Detector):
    """DAB-DETR with iterative multi-scale feature aggregation (IMFA, arXiv 2208.11356).

    The tokens are the cells of the coarsest map. Layers of encoder and decoder alternate; from the
    second on, tokens sampled from all maps around the most likely objects join the others for one
    layer of each.

    Args:
        backbone, embed_dim: see :class:`Detector`.
        encoder: its layers are :class:`SplitEncoderLayer`.
        decoder: as deep as the encoder.
        sampler: makes the additional tokens.
        in_features: names of the maps to sample from; None selects all of the backbone.
        num_levels: not used: every map is a level.
        **detector: see :class:`Detector`.
    """

    lazy_config = "common/models/imfa_detr.py"

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        encoder: ScaledEncoder,
        decoder: AnchorDecoder,
        sampler: "FeatureSampler",
        in_features: Sequence[str] | None = None,
        embed_dim: int = 256,
        num_levels: int = 4,
        **detector,
    ):
        shapes = backbone.output_shape()
        in_features = list(in_features or shapes)
        super().__init__(
            backbone=backbone,
            encoder=encoder,
            decoder=decoder,
            in_features=in_features,
            embed_dim=embed_dim,
            num_levels=len(in_features),
            **detector,
        )
        self.neck = PlainNeck(shapes, in_features, embed_dim, len(in_features))
        self.sampler = sampler

    def encode(self, images: ImageList) -> tuple[Tensor, DecodedScales]:
        """Encode images, and decode the queries on the way.

        Returns:
            The memory ``[B, S, C]``, which is the last layer's tokens of the coarsest map; and
            their geometry, with what :meth:`predict` and :meth:`losses` need.
        """
        maps = extract_maps(self.backbone, self.neck, images.tensor)
        pos, scales = self.locate_tokens(maps, images)
        tokens = maps[-1].flatten(2).transpose(1, 2)
        count = tokens.shape[1]
        (content, _, reference), _ = self.queries(tokens, scales)
        anchor, first, states = reference, torch.zeros_like(tokens), []
        for index in range(len(self.decoder.layers)):
            step, sampled_pos = scales, pos
            if index > 0:
                extra, extra_pos = self.sample(index - 1, content, reference, maps, scales)
                # The first layer's output is added from the third on.
                tokens = torch.cat([tokens + first if index > 1 else tokens, extra], dim=1)
                sampled_pos = torch.cat([pos, extra_pos], dim=1)
                step = add_tokens(scales, sampled_pos)
            tokens = self.encoder.update(index, tokens, sampled_pos, step)
            content = self.decoder.update(index, content, reference, tokens, step)
            tokens = tokens[:, :count]
            if index == 0:
                first = tokens
            states.append((content, anchor))
            anchor = self.decoder.heads.refine(index, content, reference)
            reference = anchor.detach()
        return tokens, DecodedScales.extend(scales, states=states)

    def locate_tokens(self, maps: list[Tensor], images: ImageList) -> tuple[Tensor, PyramidScales]:
        """Return position encodings ``[B, S, C]`` of the coarsest map, and its geometry."""
        dtype = maps[0].dtype
        masks, padded = padding_masks(images, [feature_map.shape[-2:] for feature_map in maps])
        exact = dtype if dtype == torch.float64 else torch.float32
        ratios = Scales.from_masks(masks, padded, exact).valid_ratios
        scales = Scales.from_masks(masks[-1:], padded, exact)
        pos = self.position_encoding(masks[-1]).to(dtype)
        return pos, PyramidScales.extend(scales, pos=pos, map_ratios=ratios)

    def sample(
        self,
        layer: int,
        content: Tensor,
        reference: Tensor,
        maps: list[Tensor],
        scales: PyramidScales,
    ) -> tuple[Tensor, Tensor]:
        """Sample tokens around the boxes of the queries with the highest class scores."""
        with torch.no_grad():
            scores = self.decoder.heads.classify(layer, content).amax(-1)
            best = scores.topk(self.sampler.count(content.shape[1]), dim=1).indices
        return self.sampler(
            gather_queries(content, best),
            gather_queries(reference, best),
            maps,
            self.level_embed,
            scales.map_ratios,
        )

    def predict(self, memory: Tensor, scales: DecodedScales) -> Predictions:
        """Return the last decoder layer's predictions."""
        return self.decoder.predict(len(scales.states) - 1, *scales.states[-1])

    def losses(
        self, memory: Tensor, scales: DecodedScales, targets: list[Target], num_objects: Tensor
    ) -> dict[str, Tensor]:
        """Return ``loss_ce``, ``loss_bbox`` and ``loss_giou``.

        Those of earlier layers end in ``_0``, ``_1`` and so on.
        """
        layers = [self.decoder.predict(index, *state) for index, state in enumerate(scales.states)]
        return self.criterion(by_layer(layers), targets, num_objects)


def add_tokens(scales: LocatedScales, pos: Tensor) -> LocatedScales:
    """Return the positions and padding of tokens with others after them, which are no padding."""
    mask = scales.padding_mask
    if mask is not None:
        extra = mask.new_zeros(mask.shape[0], pos.shape[1] - mask.shape[1])
        mask = torch.cat([mask, extra], dim=1)
    return type(scales).extend(scales, pos=pos, padding_mask=mask)


class SplitEncoderLayer(EncoderLayer):
    """An encoder layer with a :class:`SplitSelfAttention`."""

    def attend(
        self,
        query: Tensor,
        pos: Tensor,
        reference_points: Tensor | None,
        memory: Tensor,
        scales: LocatedScales,
    ) -> Tensor:
        """Apply the attention half of the layer to all tokens, see :meth:`EncoderLayer.attend`."""
        mask = scales.padding_mask
        hidden = None if mask is None else mask[:, None, None]
        return self.norm(query + self.dropout(self.self_attn(query, pos, hidden)))


class FeatureSampler(nn.Module):
    """Sample all maps at learned points around boxes (IMFA, sections 3.2 and 3.3).

    The features of a point are a weighted sum over the maps, and pass two matrices that the query
    makes.

    Args:
        embed_dim: channels ``C``.
        num_levels: the largest number of maps.
        num_points: the number of points ``P`` around each box.
        share: the share of the queries that sample.
        hidden_dim: width between the two matrices.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_levels: int = 4,
        num_points: int = 8,
        share: float = 0.2,
        hidden_dim: int = 64,
    ):
        super().__init__()
        self.num_points = num_points
        self.share = share
        self.hidden_dim = hidden_dim
        self.points = MLP(embed_dim, embed_dim, num_points * (2 + num_levels), num_layers=2)
        nn.init.zeros_(self.points[-1].weight)
        nn.init.zeros_(self.points[-1].bias)
        self.matrices = nn.Linear(embed_dim, 2 * embed_dim * hidden_dim)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.norm2 = nn.LayerNorm(embed_dim)

    def count(self, num_queries: int) -> int:
        """Return the number of queries that sample."""
        return int(num_queries * self.share)

    def forward(
        self,
        content: Tensor,
        boxes: Tensor,
        maps: list[Tensor],
        level_embed: Tensor,
        map_ratios: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            content: ``[B, K, C]``, the queries that sample.
            boxes: ``[B, K, 4]``, around which they do, normalised to each image without padding.
            maps: ``[B, C, H_l, W_l]``
            level_embed: ``[L, C]``, added to what is sampled from each map.
            map_ratios: ``[B, L, 2]``, the share of each map that an image covers.

        Returns:
            Tokens ``[B, K * P, C]`` and their position encodings, query by query.
        """
        points = self.points(content).unflatten(-1, (self.num_points, -1))
        shares = points[..., 2 : 2 + len(maps)].softmax(-1).to(content.dtype)
        # Up to a whole box away from the centre.
        offsets = points[..., :2].tanh().to(boxes.dtype)
        places = boxes[:, :, None, :2] + boxes[:, :, None, 2:] * offsets  # [B, K, P, 2]
        tokens = content.new_zeros(*places.shape[:3], content.shape[-1])
        for level, (feature_map, embedding) in enumerate(zip(maps, level_embed)):
            grid = places * map_ratios[:, level, None, None] * 2 - 1
            sampled = F.grid_sample(feature_map.to(grid.dtype), grid, align_corners=False)
            sampled = sampled.permute(0, 2, 3, 1).to(content.dtype) + embedding
            tokens = tokens + shares[..., level, None] * sampled
        first, second = self.matrices(content).chunk(2, dim=-1)
        first = first.unflatten(-1, (-1, self.hidden_dim))
        second = second.unflatten(-1, (self.hidden_dim, -1))
        tokens = self.norm2(self.norm1(tokens @ first).relu() @ second)
        # The released weights expect y before x.
        codes = sine_embedding(places[..., [1, 0]] * 2 * math.pi, tokens.shape[-1] // 2, 20.0)
        return tokens.flatten(1, 2), codes.flatten(-2).flatten(1, 2).to(tokens.dtype)
