"""DN-DETR: the meta-architecture, its labelled anchors and its denoising."""

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ..modeling.criterion import Target
from ..modeling.dino import Denoising, arrange_denoising
from ..modeling.heads import Predictions, by_layer, inverse_sigmoid
from ..modeling.queries import Queries
from ..modeling.scales import Scales
from .dab_detr import AnchorBoxes
from .single_scale import SingleScaleDetector


@META_ARCH_REGISTRY.register()
class DNDETR(SingleScaleDetector):
    """DN-DETR (arXiv 2203.01305): DAB-DETR that also learns to restore noised objects.

    Its queries are :class:`LabelledAnchors`.

    Args:
        denoising: the denoising in training; None disables it.
        **detector: see :class:`SingleScaleDetector`.
    """

    lazy_config = "common/models/dn_detr.py"

    @configurable
    def __init__(self, *, denoising: "QueryDenoising | None" = None, **detector):
        super().__init__(**detector)
        self.denoising = denoising

    def losses(
        self, memory: Tensor, scales: Scales, targets: list[Target], num_objects: Tensor
    ) -> dict[str, Tensor]:
        """Return ``loss_ce``, ``loss_bbox`` and ``loss_giou``.

        Those of earlier layers end in ``_0``, ``_1`` and so on, and those of the denoising queries
        in ``_dn``, ``_dn_0`` and so on.
        """
        if self.denoising is None:
            return super().losses(memory, scales, targets, num_objects)
        queries, _ = self.queries(memory, scales)
        denoising = self.denoising(targets, queries.content.shape[1], self.queries)
        count = denoising.queries.content.shape[1]
        queries = Queries(
            torch.cat([denoising.queries.content, queries.content], dim=1),
            None,
            torch.cat([denoising.queries.reference, queries.reference], dim=1),
        )
        layers = self.decoder(queries, memory, scales, denoising.attn_mask)
        matching = [Predictions(logits[:, count:], boxes[:, count:]) for logits, boxes in layers]
        # Unlike DINO's, slots without an object have no loss: all others are put in one row.
        image = torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(denoising.matches)])
        slot = torch.cat([queries for queries, _ in denoising.matches])
        restored = [
            Predictions(logits[image, slot][None], boxes[image, slot][None])
            for logits, boxes in layers
        ]
        objects = Target(
            torch.cat([t.labels.repeat(denoising.num_groups) for t in targets]),
            torch.cat([t.boxes.repeat(denoising.num_groups, 1) for t in targets]),
        )
        index = torch.arange(len(slot))
        return self.criterion(by_layer(matching), targets, num_objects) | self.criterion(
            by_layer(restored, "_dn"),
            [objects],
            num_objects * denoising.num_groups,
            [(index, index)],
        )


class LabelledAnchors(AnchorBoxes):
    """Anchor boxes whose content is the embedding of a class (DN-DETR, section 4).

    Matching queries have that of an unknown class; patterns are added to it. The last channel tells
    whether a query denoises.

    Args:
        embed_dim: channels ``C``.
        num_labels: foreground classes.
        num_queries, num_patterns, uniform_centers: see :class:`AnchorBoxes`.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_labels: int = 80,
        num_queries: int = 300,
        num_patterns: int = 0,
        uniform_centers: bool = False,
    ):
        super().__init__(embed_dim, num_queries, num_patterns, uniform_centers)
        self.num_labels = num_labels
        # The last one is the unknown class.
        self.label_embed = nn.Embedding(num_labels + 1, embed_dim - 1)

    def content(self, num_anchors: int) -> Tensor:
        """Return the content of all matching queries, ``[Q, C]``."""
        unknown = torch.full((num_anchors,), self.num_labels, device=self.label_embed.weight.device)
        content = self.embed(unknown, denoises=False)
        if self.patterns is None:
            return content
        return content.repeat(self.patterns.num_embeddings, 1) + super().content(num_anchors)

    def embed(self, labels: Tensor, denoises: bool) -> Tensor:
        """``[K]`` -> ``[K, C]``"""
        return nn.functional.pad(self.label_embed(labels), (0, 1), value=float(denoises))


class QueryDenoising(nn.Module):
    """DN-DETR's denoising (arXiv 2203.01305, sections 4.2 and 4.3).

    Each group holds every object of an image once, with a noised class and a noised box.

    Args:
        num_classes: foreground classes.
        num_groups: the number of groups.
        label_noise: the share of the queries that gets a random class.
        box_noise: the largest move of a centre, in half extents of the box, and the largest change
            of its size, in extents.
        border: boxes are kept this far from the border of ``[0, 1]``.
    """

    def __init__(
        self,
        num_classes: int = 80,
        num_groups: int = 5,
        label_noise: float = 0.2,
        box_noise: float = 0.4,
        border: float = 1e-3,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.num_groups = num_groups
        self.label_noise = label_noise
        self.box_noise = box_noise
        self.border = border

    def forward(
        self, targets: list[Target], num_matching: int, anchors: LabelledAnchors
    ) -> Denoising:
        """
        Args:
            targets: the objects of each image.
            num_matching: ``Q``, the number of matching queries, which follow the denoising ones.
            anchors: embed the classes.
        """
        labels = torch.cat([target.labels.repeat(self.num_groups) for target in targets])
        boxes = torch.cat([target.boxes.repeat(self.num_groups, 1) for target in targets])
        flipped = torch.rand(labels.shape, device=labels.device) < self.label_noise
        labels = torch.where(flipped, torch.randint_like(labels, self.num_classes), labels)
        size = boxes[:, 2:]
        moves = (torch.rand_like(boxes) * 2 - 1) * torch.cat([size / 2, size], dim=1)
        boxes = inverse_sigmoid(boxes + moves * self.box_noise, self.border).sigmoid()
        counts = [len(target.labels) for target in targets]
        content = anchors.embed(labels, denoises=True)
        return arrange_denoising(content, boxes, counts, self.num_groups, 1, num_matching)
