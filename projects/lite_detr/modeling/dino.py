"""DINO: the meta-architecture, its queries and its contrastive denoising."""

import math
from typing import NamedTuple

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from .criterion import SetCriterion, Target
from .detector import Detector
from .heads import Predictions, by_layer
from .layers import MLP, sine_embedding
from .queries import ProposalQueries, Queries, expand_content
from .scales import Scales


@META_ARCH_REGISTRY.register()
class DINO(Detector):
    """DINO (arXiv 2203.03605), with the full or an interleaved encoder.

    Its queries are :class:`DinoQueries` (mixed query selection). Its decoder looks forward twice,
    encodes the references of each layer and shares one pair of heads.

    Args:
        denoising: contrastive denoising in training; None disables it.
        denoising_criterion: makes the losses of the denoising queries; None: ``criterion`` does.
        **detector: see :class:`Detector`.
    """

    lazy_config = "common/models/dino.py"

    @configurable
    def __init__(
        self,
        *,
        denoising: "ContrastiveDenoising | None" = None,
        denoising_criterion: SetCriterion | None = None,
        **detector,
    ):
        super().__init__(**detector)
        self.denoising = denoising
        self.denoising_criterion = denoising_criterion

    def losses(
        self, memory: Tensor, scales: Scales, targets: list[Target], num_objects: Tensor
    ) -> dict[str, Tensor]:
        """Return ``loss_ce``, ``loss_bbox`` and ``loss_giou``.

        Those of earlier layers end in ``_0``, ``_1`` and so on, those of the proposals in ``_enc``,
        and those of the denoising queries in ``_dn``, ``_dn_0`` and so on.
        """
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
        matching = [layer.slice(count) for layer in layers]
        restored = [Predictions(logits[:, :count], boxes[:, :count]) for logits, boxes in layers]
        outputs = by_layer(matching) | {"_enc": proposals}
        denoising_criterion = self.denoising_criterion or self.criterion
        return self.criterion(outputs, targets, num_objects) | denoising_criterion(
            by_layer(restored, "_dn"),
            targets,
            num_objects * denoising.num_groups,
            denoising.matches,
        )


class DinoQueries(ProposalQueries):
    """DINO's queries (arXiv 2203.03605, section 3.4): learned content, proposals by class score.

    A proposal is ranked by its best class, and only the selected ones get boxes and are trained.
    There is no position part: the decoder encodes the references of each layer.

    Args:
        embed_dim: channels ``C``.
        num_classes: foreground classes.
        num_queries: ``Q``; an image with fewer tokens gets as many queries as it has tokens.
    """

    class_agnostic = False

    def __init__(self, embed_dim: int = 256, num_classes: int = 80, num_queries: int = 900):
        super().__init__(embed_dim, num_classes)
        self.num_queries = num_queries
        self.content = nn.Embedding(num_queries, embed_dim)

    def forward(self, memory: Tensor, scales: Scales) -> tuple[Queries, Predictions]:
        """Return the queries, and the ``Q`` selected proposals for the encoder's loss."""
        reference, proposals = self.propose(memory, scales, self.num_queries)
        return Queries(expand_content(self.content, reference), None, reference), proposals


class ReferencePosition(nn.Module):
    """The position part of DINO's queries: an MLP on the sine encoding of their references.

    Args:
        embed_dim: channels ``C``.
    """

    def __init__(self, embed_dim: int = 256):
        super().__init__()
        self.embed_dim = embed_dim
        self.mlp = MLP(2 * embed_dim, embed_dim, embed_dim, num_layers=2)
        for linear in (self.mlp[0], self.mlp[2]):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, boxes: Tensor) -> Tensor:
        """``[B, Q, 4]``, in the padded frame of the finest scale -> ``[B, Q, C]``"""
        # The released weights expect y before x.
        boxes = boxes[..., [1, 0, 2, 3]]
        encoding = sine_embedding(boxes * 2 * math.pi, self.embed_dim // 2, 10000.0).flatten(-2)
        return self.mlp(encoding.to(self.mlp[0].weight.dtype))


class Denoising(NamedTuple):
    """The denoising part of a batch.

    Attributes:
        queries: ``[B, N, C]`` content and ``[B, N, 4]`` references, to go before the matching
            queries; ``N`` is 0 for a batch without objects.
        matches: the positive queries and the objects they should restore, for each image.
        num_groups: the number of positive queries per object.
        attn_mask: ``[N + Q, N + Q]`` bool, True where a query may not see another.
    """

    queries: Queries
    matches: list[tuple[Tensor, Tensor]]
    num_groups: int
    attn_mask: Tensor


class ContrastiveDenoising(nn.Module):
    """DINO's contrastive denoising (arXiv 2203.03605, section 3.3).

    Each group holds every object of an image twice: as a positive query, whose corners are moved by
    at most half the box's size times ``box_noise`` and which should restore the object, and as a
    negative one, moved further, which should predict nothing. A group sees itself and the matching
    queries; the other groups are hidden from it, and all groups from the matching queries.

    Args:
        embed_dim: channels ``C``.
        num_classes: foreground classes.
        num_queries: the approximate number of positive queries per image; the number of groups is
            as large as the most objects in an image of the batch allow, and at least one.
        label_noise: half of this share of the queries gets a random class.
        box_noise: the largest move of a positive corner, in half extents of the box.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_classes: int = 80,
        num_queries: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.label_noise = label_noise
        self.box_noise = box_noise
        # One more than there are classes, as in the released weights; the last one is never used.
        self.label_embed = nn.Embedding(num_classes + 1, embed_dim)

    def forward(self, targets: list[Target], num_matching: int) -> Denoising:
        """
        Args:
            targets: the objects of each image.
            num_matching: ``Q``, the number of matching queries, which follow the denoising ones.
        """
        counts = [len(target.labels) for target in targets]
        largest = max(counts)
        num_groups = max(self.num_queries // largest, 1) if largest else 1
        labels = self._noised_labels(targets, num_groups)
        boxes = self._noised_boxes(targets, num_groups)
        return arrange_denoising(
            self.label_embed(labels), boxes, counts, num_groups, 2, num_matching
        )

    def _noised_labels(self, targets: list[Target], num_groups: int) -> Tensor:
        """Return the classes of all queries, image by image: ``[2 * num_groups * objects]``."""
        labels = torch.cat([target.labels.repeat(2 * num_groups) for target in targets])
        flipped = torch.rand(labels.shape, device=labels.device) < self.label_noise * 0.5
        return torch.where(flipped, torch.randint_like(labels, self.num_classes), labels)

    def _noised_boxes(self, targets: list[Target], num_groups: int) -> Tensor:
        """Return their boxes ``[2 * num_groups * objects, 4]``, each corner moved on its own."""
        noised = []
        for target in targets:
            center, size = target.boxes.split(2, dim=-1)
            corners = torch.cat([center - size / 2, center + size / 2], dim=-1)
            half_size = torch.cat([size, size], dim=-1) / 2
            amount = torch.rand(num_groups, 2, *corners.shape, device=corners.device)
            amount[:, 1] += 1.0  # the negative ones
            sign = torch.randint_like(amount, 2) * 2 - 1
            moves = (amount * sign).to(corners.dtype) * half_size * self.box_noise
            noised.append((corners + moves).clamp(min=0, max=1).flatten(0, 2))
        low, high = torch.cat(noised).split(2, dim=-1)
        # Corners of negative queries may have passed each other.
        return torch.cat([(low + high) / 2, (high - low).clamp(min=0)], dim=-1)


def arrange_denoising(
    content: Tensor,
    boxes: Tensor,
    counts: list[int],
    num_groups: int,
    queries_per_object: int,
    num_matching: int,
) -> Denoising:
    """Arrange the denoising queries of a batch in groups that do not see each other.

    A group is all its first queries of the objects and then all its second ones, each image's
    padded to the largest number of objects: slot =
    ``(group * queries_per_object + which) * largest + object``.

    Args:
        content: ``[K, C]``, image by image, and group by group within an image.
        boxes: ``[K, 4]``, in the same order.
        counts: the number of objects of each image.
        num_groups: the number of groups.
        queries_per_object: the number of queries of an object in a group; only the first is
            positive.
        num_matching: ``Q``, the number of matching queries, which follow the denoising ones.
    """
    device, largest = content.device, max(counts)
    rows = queries_per_object * num_groups
    starts = torch.arange(rows, device=device) * largest
    image = torch.cat([torch.full((rows * n,), i, device=device) for i, n in enumerate(counts)])
    slot = torch.cat([(starts[:, None] + torch.arange(n, device=device)).flatten() for n in counts])
    tokens = content.new_zeros(len(counts), rows * largest, content.shape[-1])
    reference = boxes.new_full((len(counts), rows * largest, 4), 0.5)
    reference[image, slot] = boxes
    matches = [
        (
            (starts[::queries_per_object, None] + torch.arange(n, device=device)).flatten().cpu(),
            torch.arange(n).repeat(num_groups),
        )
        for n in counts
    ]
    group = torch.arange(num_groups, device=device).repeat_interleave(queries_per_object * largest)
    # The matching queries are a group of their own, which all others may see.
    group = torch.cat([group, torch.full((num_matching,), -1, device=device)])
    mask = (group[:, None] != group) & (group != -1)
    queries = Queries(tokens.index_put((image, slot), content), None, reference)
    return Denoising(queries, matches, num_groups, mask)
