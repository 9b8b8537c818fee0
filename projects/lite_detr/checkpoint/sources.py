"""Where weights come from, as their keys tell."""

import re
from collections.abc import Collection
from typing import NamedTuple

from .rules import (
    AUTHORS,
    DETECTRON2_RESNET,
    SWIN,
    TORCHVISION_RESNET,
    TRANSFORMERS,
    Rule,
    table,
)


class Source(NamedTuple):
    """An implementation whose weights can be converted.

    Attributes:
        name: what messages call it.
        marks: patterns, each of which begins some key of its weights.
        rules: how its names become ours.
        ignored: patterns of keys that nothing here corresponds to, with the reason.
    """

    name: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]
    ignored: tuple[tuple[str, str], ...] = ()

    def recognises(self, keys: Collection[str]) -> bool:
        return all(any(re.match(mark, key) for key in keys) for mark in self.marks)


CLASSIFIER = "belongs to the classifier that the backbone was trained in"
TWO_STAGE = r"transformer\.pos_trans\."
DINO = r"transformer\.decoder\.ref_point_head\."

# The first that recognises the keys counts.
SOURCES = (
    Source(
        "Lite-DINO",
        (DINO, r"transformer\.encoder\.layers\.\d+\.(linear12|self_attn\.query_proj)\."),
        AUTHORS,
    ),
    Source("DINO", (DINO,), AUTHORS),
    Source("H-DETR", (TWO_STAGE, r"query_embed\."), AUTHORS),
    Source("two-stage Deformable DETR", (TWO_STAGE,), AUTHORS),
    Source(
        "Deformable DETR with box refinement",
        (r"transformer\.reference_points\.", r"transformer\.decoder\.bbox_embed\."),
        AUTHORS,
    ),
    Source("single-stage Deformable DETR", (r"transformer\.reference_points\.",), AUTHORS),
    Source(
        "transformers' Deformable DETR",
        (r"model\.encoder\.layers\.\d+\.self_attn\.sampling_offsets\.",),
        TRANSFORMERS,
    ),
    Source(
        "torchvision's ResNet",
        (r"conv1\.weight", r"layer1\.0\.conv1\.weight"),
        table(*TORCHVISION_RESNET, ours="backbone."),
        ((r"fc\..+", CLASSIFIER),),
    ),
    Source(
        "Detectron2's ResNet",
        (r"(backbone\.bottom_up\.)?stem\.conv1\.weight",),
        table(*DETECTRON2_RESNET, prefix=r"(?:backbone\.bottom_up\.)?", ours="backbone."),
        (
            (r"(stem\.)?fc\..+", CLASSIFIER),
            (
                r"(backbone\.(fpn|top_block)|proposal_generator|(roi|sem_seg)_heads?|head|pixel_).+",
                "belongs to the detector that the backbone was trained in",
            ),
        ),
    ),
    Source(
        "Swin Transformer",
        (r"patch_embed\.proj\.weight", r"layers\.0\.blocks\.0\.attn\.qkv\.weight"),
        table(*SWIN, ours="backbone."),
        ((r"(norm|head)\..+", CLASSIFIER),),
    ),
)


def recognise(keys: Collection[str]) -> Source | None:
    """The implementation that keys are of; None if it is none of :data:`SOURCES`."""
    return next((source for source in SOURCES if source.recognises(keys)), None)
