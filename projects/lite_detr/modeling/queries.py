"""The decoder's queries: learned embeddings, or the encoder's best proposals."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .heads import Predictions, box_head, class_head
from .layers import sine_embedding
from .scales import Scales


class Queries(NamedTuple):
    """The decoder's input.

    Attributes:
        content: ``[B, Q, C]``
        pos: ``[B, Q, C]``, the position part, added to the content in every attention; None if
            the decoder makes it from the references.
        reference: ``[B, Q, 2]`` points or ``[B, Q, 4]`` boxes (cx, cy, w, h), normalised to each
            image without its padding.
    """

    content: Tensor
    pos: Tensor | None
    reference: Tensor


class LearnedQueries(nn.Module):
    """Learned content, position and reference points (Deformable DETR, section 4.2).

    Args:
        embed_dim: channels ``C``.
        num_queries: ``Q``
    """

    def __init__(self, embed_dim: int = 256, num_queries: int = 300):
        super().__init__()
        self.content = nn.Embedding(num_queries, embed_dim)
        self.pos = nn.Embedding(num_queries, embed_dim)
        self.reference_points = nn.Linear(embed_dim, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, memory: Tensor, scales: Scales) -> tuple[Queries, None]:
        """Return the queries, and no proposals; of ``memory [B, S, C]`` only ``B`` matters."""
        content = self.content.weight.expand(memory.shape[0], -1, -1)
        pos = self.pos.weight.expand(memory.shape[0], -1, -1)
        reference = self.reference_points(pos).to(scales.centers.dtype).sigmoid()
        return Queries(content, pos, reference), None


class ProposalQueries(nn.Module):
    """Base of the queries that start as the encoder's best proposals.

    Every token proposes a box around itself, and the proposals with the highest scores become the
    decoder's references (Deformable DETR, appendix A.4.1). Where scores are class-agnostic, only
    the first class channel counts, trained on objects of any class; elsewhere the best class does.

    Args:
        embed_dim: channels ``C``.
        num_classes: foreground classes; as in the references, the proposal head has all of them.
    """

    # True if the proposal head's first channel means "any object", and its loss is that of all
    # tokens; False if each channel means its class, and only the selected proposals are trained.
    class_agnostic = True

    def __init__(self, embed_dim: int, num_classes: int):
        super().__init__()
        self.enc_output = nn.Linear(embed_dim, embed_dim)
        self.enc_output_norm = nn.LayerNorm(embed_dim)
        nn.init.xavier_uniform_(self.enc_output.weight)
        self.class_embed = class_head(embed_dim, num_classes)
        self.bbox_embed = box_head(embed_dim)

    def propose(
        self, memory: Tensor, scales: Scales, num_queries: int
    ) -> tuple[Tensor, Predictions]:
        """Select the best proposals.

        Args:
            memory: ``[B, S, C]``, the encoder's output.
            scales: the geometry of its tokens.
            num_queries: ``Q``, limited by the number of tokens.

        Returns:
            The references ``[B, Q, 4]`` without gradients, and the proposals: the ``Q`` selected
            ones, or those of all ``S`` tokens in training, if the loss is that of all.
        """
        features, anchors = self.proposal_features(memory, scales)
        logits = self.class_embed(features)
        scores = logits[..., 0] if self.class_agnostic else logits.amax(-1)
        best = scores.topk(static_min(num_queries, memory.shape[1]), dim=1).indices
        needs_all = self.class_agnostic and self.training
        if not needs_all:
            features, anchors, logits = (
                gather_queries(tokens, best) for tokens in (features, anchors, logits)
            )
        boxes = (self.bbox_embed(features).to(anchors.dtype) + anchors).sigmoid()
        reference = (gather_queries(boxes, best) if needs_all else boxes).detach()
        return reference, Predictions(logits.to(boxes.dtype), boxes)

    def proposal_features(self, memory: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        """Return the proposals' features ``[B, S, C]`` and their anchors' logits ``[B, S, 4]``.

        A token without an anchor has the features of a zero token and the box (1, 1, 1, 1). As in
        the references, it is ranked with the others; training teaches it to score low.
        """
        anchors, usable = anchor_logits(scales)
        features = self.enc_output(memory.masked_fill(~usable, 0.0))
        return self.enc_output_norm(features), anchors


class TwoStageQueries(ProposalQueries):
    """Content and position both encode the proposed box (Deformable DETR, appendix A.4.1).

    Args:
        embed_dim: channels ``C``.
        num_classes: foreground classes.
        num_queries: ``Q``; an image with fewer tokens gets as many queries as it has tokens.
    """

    def __init__(self, embed_dim: int = 256, num_classes: int = 80, num_queries: int = 300):
        super().__init__(embed_dim, num_classes)
        self.num_queries = num_queries
        self.encode_box = BoxEncoding(embed_dim)

    def forward(self, memory: Tensor, scales: Scales) -> tuple[Queries, Predictions]:
        """Return the queries, and the proposals for the encoder's loss."""
        reference, proposals = self.propose(memory, scales, self.num_queries)
        pos, content = self.encode_box(reference)
        return Queries(content, pos, reference), proposals


class BoxEncoding(nn.Module):
    """A linear map of the sine encoding of boxes, for both parts of a query.

    Args:
        embed_dim: channels ``C``.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        self.embed_dim = embed_dim
        self.linear = nn.Linear(2 * embed_dim, 2 * embed_dim)
        self.norm = nn.LayerNorm(2 * embed_dim)
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, Q, 4]`` -> position ``[B, Q, C]`` and content ``[B, Q, C]``"""
        encoding = sine_embedding(boxes * 2 * math.pi, self.embed_dim // 2, 10000.0).flatten(-2)
        encoding = encoding.to(self.linear.weight.dtype)
        pos, content = self.norm(self.linear(encoding)).chunk(2, dim=-1)
        return pos, content


def anchor_logits(scales: Scales, base_size: float = 0.05) -> tuple[Tensor, Tensor]:
    """Return the box that each token proposes before its features move it.

    Boxes are square in the image's normalised frame and double in size with each scale. Like all
    geometry, they are computed in float32.

    Args:
        scales: the geometry of the tokens.
        base_size: side on the finest scale, as a share of the image.

    Returns:
        Box logits ``[B, S, 4]``, infinite for tokens without an anchor; and ``[B, S, 1]`` bool,
        True for tokens with one: not on padding, and not within 1 % of the border, where logits
        explode.
    """
    sizes = torch.cat(
        [
            scales.centers.new_full((height * width, 2), base_size * 2.0**level)
            for level, (height, width) in enumerate(scales.shapes)
        ]
    )
    boxes = torch.cat([scales.centers, sizes.expand(scales.centers.shape)], dim=-1).float()
    # The centres of padding lie beyond 1. Those on the limits, as of the first of 50 rows, are out,
    # as in the references, also where a runtime rounds a quotient otherwise.
    rounding = 1e-6
    usable = ((boxes > 0.01 + rounding) & (boxes < 0.99 - rounding)).all(-1, keepdim=True)
    logits = torch.log(boxes / (1 - boxes)).masked_fill(~usable, float("inf"))
    return logits.to(scales.centers.dtype), usable


def static_min(num_queries: int, num_tokens: int) -> int:
    """Return the smaller number, which an export keeps as a constant.

    With ``min``, an export would keep a formula in all shapes that follow. Here it keeps the choice
    made for its example, which has many tokens, and later images need at least that many.
    """
    return num_tokens if num_tokens < num_queries else num_queries


def gather_queries(tokens: Tensor, indices: Tensor) -> Tensor:
    """``[B, S, C]`` at ``[B, Q]`` -> ``[B, Q, C]``"""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def expand_content(embedding: nn.Embedding, reference: Tensor) -> Tensor:
    """Return the first ``Q`` embeddings ``[B, Q, C]`` for references ``[B, Q, 4]``."""
    batch, queries, _ = reference.shape
    return embedding.weight[:queries].expand(batch, -1, -1)
