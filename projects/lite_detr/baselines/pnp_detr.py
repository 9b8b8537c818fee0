"""PnP-DETR: the meta-architecture, and the sampling of tokens before the encoder."""

from dataclasses import dataclass

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from detectron2.utils import comm
from torch import Tensor, nn

from ..modeling.criterion import Target
from ..modeling.queries import gather_queries
from .detr import DETR, share_of_batch
from .single_scale import LocatedScales
from .sparse_encoder import largest_count


@dataclass(frozen=True, eq=False)
class SampledScales(LocatedScales):
    """The geometry of a map; positions and padding are those of the tokens sampled from it.

    Attributes:
        scores: ``[B, K]``, of the fine tokens.
    """

    scores: Tensor


@META_ARCH_REGISTRY.register()
class PnPDETR(DETR):
    """PnP-DETR (arXiv 2109.07036): DETR on a sample of the tokens and a summary of the others.

    Args:
        sampler: makes these tokens.
        weight_scores: the weight of the loss that keeps scores small.
        **detector: see :class:`DETR`.
    """

    lazy_config = "common/models/pnp_detr.py"

    @configurable
    def __init__(self, *, sampler: "TokenSampler", weight_scores: float = 1e-4, **detector):
        super().__init__(**detector)
        self.sampler = sampler
        self.weight_scores = weight_scores

    def encode(self, images: ImageList) -> tuple[Tensor, SampledScales]:
        """Encode images: memory ``[B, K + N, C]``, fine tokens first, and its positions."""
        tokens, pos, scales = self.make_tokens(images)
        tokens, scales = self.sampler(tokens, scales)
        return self.encoder(tokens, scales.pos, scales), scales

    def losses(
        self, memory: Tensor, scales: SampledScales, targets: list[Target], num_objects: Tensor
    ) -> dict[str, Tensor]:
        """Return DETR's losses, and ``loss_scores``, the mean score of the fine tokens."""
        losses = super().losses(memory, scales, targets, num_objects)
        mean = scales.scores.sum() / max(scales.scores.numel(), 1)
        share = share_of_batch(targets, num_objects.clamp(min=1) / comm.get_world_size())
        return losses | {"loss_scores": self.weight_scores * share * mean}


class TokenSampler(nn.Module):
    """Poll and pool (PnP-DETR, section 3): the best-scored tokens, and averages of all others.

    Args:
        embed_dim: channels ``C``.
        ratio: the share of an image's tokens that are fine.
        max_ratio: in training, the share is drawn for each batch between ``ratio`` and this.
        num_coarse: ``N``, the number of averages.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        ratio: float = 1 / 3,
        max_ratio: float = 0.8,
        num_coarse: int = 60,
    ):
        super().__init__()
        self.ratio = ratio
        self.max_ratio = max_ratio
        self.score = nn.Sequential(
            nn.Conv2d(embed_dim, embed_dim, kernel_size=1),
            nn.ReLU(),
            nn.Conv2d(embed_dim, 1, kernel_size=1),
        )
        self.norm = nn.LayerNorm(embed_dim, elementwise_affine=False)
        self.weights = nn.Linear(embed_dim, num_coarse)
        self.value = nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tensor, scales: LocatedScales) -> tuple[Tensor, SampledScales]:
        """
        Args:
            tokens: ``[B, S, C]``
            scales: their positions and padding.

        Returns:
            ``[B, K + N, C]``, fine tokens by falling score and then coarse ones; ``K`` is the
            largest number of an image. And their positions and padding.
        """
        padding = scales.padding_mask
        if padding is None:
            padding = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        scores = self.score(tokens.transpose(1, 2)[..., None]).flatten(1).sigmoid()
        ratio = self.draw_ratio()
        # The product in float32, as in the reference.
        counts = ((~padding).sum(1).float() * ratio).long()
        largest = largest_count(counts, tokens.shape[1], ratio)
        order = scores.masked_fill(padding, -1.0).argsort(dim=1, descending=True)
        surplus = torch.arange(tokens.shape[1], device=tokens.device) >= counts[:, None]
        fine = order[:, :largest]

        tokens = self.norm(tokens)
        fine_scores = scores.gather(1, fine)
        fine_tokens = gather_queries(tokens, fine) * fine_scores[..., None]
        pooled = torch.zeros_like(padding).scatter(1, order, surplus) & ~padding
        weights = self.weights(tokens).masked_fill(~pooled[..., None], float("-inf"))
        weights = weights.softmax(1).transpose(1, 2).to(tokens.dtype)
        parts = torch.cat([fine_tokens, weights @ self.value(tokens)], dim=1)
        pos = torch.cat([gather_queries(scales.pos, fine), weights @ scales.pos], dim=1)
        coarse_mask = padding.new_zeros(padding.shape[0], weights.shape[1])
        mask = torch.cat([surplus[:, :largest], coarse_mask], dim=1)
        return parts, SampledScales.extend(scales, pos=pos, padding_mask=mask, scores=fine_scores)

    def draw_ratio(self) -> float:
        """Return the share of fine tokens for a batch."""
        if not self.training:
            return self.ratio
        return self.ratio + (self.max_ratio - self.ratio) * torch.rand(()).item()
