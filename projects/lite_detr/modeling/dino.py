"""DINO: the meta-architecture."""

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from .denoising import ContrastiveDenoising
from .detector import Detector
from .heads import Predictions, by_layer
from .queries import Queries
from .scales import Scales
from .targets import Target


@META_ARCH_REGISTRY.register()
class DINO(Detector):
    """DINO (arXiv 2203.03605), with the full or an interleaved encoder.

    Its queries are :class:`DinoQueries` (mixed query selection), and its decoder looks forward
    twice, encodes the references of each layer and shares one pair of heads.

    Args:
        denoising: contrastive denoising in training; None does without.
        **detector: see :class:`Detector`.
    """

    lazy_config = "common/models/dino.py"

    @configurable
    def __init__(self, *, denoising: ContrastiveDenoising | None = None, **detector):
        super().__init__(**detector)
        self.denoising = denoising

    def losses(
        self, memory: Tensor, scales: Scales, targets: list[Target], num_objects: Tensor
    ) -> dict[str, Tensor]:
        """``loss_ce``, ``loss_bbox``, ``loss_giou``; ``_0`` ... of earlier layers, ``_enc``, and
        ``_dn``, ``_dn_0`` ... of the denoising queries."""
        queries, proposals = self.queries(memory, scales)
        if self.denoising is None:
            outputs = by_layer(self.decoder(queries, memory, scales))
            return self.criterion(outputs | {"_enc": proposals}, targets, num_objects)

        denoising = self.denoising(targets, queries.content.shape[1])
        count = denoising.queries.content.shape[1]
        queries = Queries(
            torch.cat([denoising.queries.content, queries.content], dim=1),
            None,
            torch.cat([denoising.queries.reference, queries.reference], dim=1),
        )
        layers = self.decoder(queries, memory, scales, denoising.attn_mask)
        matching = [Predictions(logits[:, count:], boxes[:, count:]) for logits, boxes in layers]
        restored = [Predictions(logits[:, :count], boxes[:, :count]) for logits, boxes in layers]
        outputs = by_layer(matching) | {"_enc": proposals}
        return self.criterion(outputs, targets, num_objects) | self.criterion(
            by_layer(restored, "_dn"),
            targets,
            num_objects * denoising.num_groups,
            denoising.matches,
        )
