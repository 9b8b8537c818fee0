"""Where a decoder's queries come from: learned embeddings or the encoder's proposals."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .heads import Predictions, box_head, class_head
from .position_encoding import sine_embedding
from .scales import Scales


class Queries(NamedTuple):
    """The decoder's input.

    Attributes:
        content: ``[B, Q, C]``
        pos: ``[B, Q, C]``, the position part, added to the content in every attention.
        reference: ``[B, Q, 2]`` points or ``[B, Q, 4]`` boxes (cx, cy, w, h), normalised to each
            image without its padding.
    """

    content: Tensor
    pos: Tensor
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
        """``memory [B, S, C]`` only says how many images there are; there are no proposals."""
        content = self.content.weight.expand(memory.shape[0], -1, -1)
        pos = self.pos.weight.expand(memory.shape[0], -1, -1)
        reference = self.reference_points(pos).to(scales.centers.dtype).sigmoid()
        return Queries(content, pos, reference), None


class TwoStageQueries(nn.Module):
    """The encoder's best proposals become the queries (Deformable DETR, appendix A.4.1).

    Every token proposes a box around itself. The ``num_queries`` proposals with the highest score
    are the decoder's references, and the sine encoding of their boxes gives content and position.
    Scores are class-agnostic: the first class channel alone, trained on objects of any class.

    Args:
        embed_dim: channels ``C``.
        num_classes: foreground classes; the references give the proposal head all of them.
        num_queries: ``Q``; an image with fewer tokens gets as many queries as it has tokens.
    """

    def __init__(self, embed_dim: int = 256, num_classes: int = 80, num_queries: int = 300):
        super().__init__()
        self.num_queries = num_queries
        self.enc_output = nn.Linear(embed_dim, embed_dim)
        self.enc_output_norm = nn.LayerNorm(embed_dim)
        self.pos_trans = nn.Linear(2 * embed_dim, 2 * embed_dim)
        self.pos_trans_norm = nn.LayerNorm(2 * embed_dim)
        for linear in (self.enc_output, self.pos_trans):
            nn.init.xavier_uniform_(linear.weight)
        self.class_embed = class_head(embed_dim, num_classes)
        self.bbox_embed = box_head(embed_dim)

    def forward(self, memory: Tensor, scales: Scales) -> tuple[Queries, Predictions]:
        """
        Args:
            memory: ``[B, S, C]``, the encoder's output.
            scales: the geometry of its tokens.

        Returns:
            The queries, and the proposals of all ``S`` tokens for the encoder's loss.
        """
        anchors, usable = anchor_logits(scales)
        features = memory.masked_fill(~usable, 0.0)
        features = self.enc_output_norm(self.enc_output(features))
        logits = self.class_embed(features)
        box_logits = self.bbox_embed(features).to(anchors.dtype) + anchors

        count = min(self.num_queries, memory.shape[1])
        best = logits[..., 0].topk(count, dim=1).indices
        reference = box_logits.gather(1, best[..., None].expand(-1, -1, 4)).detach().sigmoid()
        half_width = memory.shape[-1] // 2
        encoding = sine_embedding(reference * 2 * math.pi, half_width, 10000.0).flatten(-2)
        pos, content = self.pos_trans_norm(
            self.pos_trans(encoding.to(self.pos_trans.weight.dtype))
        ).chunk(2, dim=-1)
        proposals = Predictions(logits.to(anchors.dtype), box_logits.sigmoid())
        return Queries(content, pos, reference), proposals


def anchor_logits(scales: Scales, base_size: float = 0.05) -> tuple[Tensor, Tensor]:
    """The box that each token proposes before its features have a say.

    Boxes are square in the image's normalised frame and double with each scale.

    Args:
        scales: the geometry of the tokens.
        base_size: side on the finest scale, as a share of the image.

    Returns:
        Box logits ``[B, S, 4]``, infinite where a token may not propose, and where it may
        ``[B, S, 1]``: not on padding, and not within 1 % of the border, where logits explode.
    """
    sizes = torch.cat(
        [
            scales.centers.new_full((height * width, 2), base_size * 2.0**level)
            for level, (height, width) in enumerate(scales.shapes)
        ]
    )
    boxes = torch.cat([scales.centers, sizes.expand(scales.centers.shape)], dim=-1)
    usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
    if scales.padding_mask is not None:
        usable = usable & ~scales.padding_mask[..., None]
    return torch.log(boxes / (1 - boxes)).masked_fill(~usable, float("inf")), usable
