"""The DINO and Deformable DETR of MMDetection 3, and those of its detectors that do not fit."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from .rules import TORCHVISION_RESNET, Source, table
from .settings import borders, images, losses, positions
from .transforms import SEPARATE_HEADS, TRANSFORMS, Weight, Weights

RULES = (
    *table(*TORCHVISION_RESNET, prefix=r"backbone\.", ours="backbone."),
    *table(
        (r"patch_embed\.projection\.(\w+)", "patch_embed.proj.{1}"),
        (r"patch_embed\.norm\.(\w+)", "patch_embed.norm.{1}"),
        (r"stages\.(\d)\.blocks\.(\d+)\.attn\.w_msa\.(.+)", "layers.{1}.blocks.{2}.attn.{3}"),
        (r"stages\.(\d)\.blocks\.(\d+)\.(norm\d\.\w+)", "layers.{1}.blocks.{2}.{3}"),
        (
            r"stages\.(\d)\.blocks\.(\d+)\.ffn\.layers\.0\.0\.(\w+)",
            "layers.{1}.blocks.{2}.mlp.fc1.{3}",
        ),
        (
            r"stages\.(\d)\.blocks\.(\d+)\.ffn\.layers\.1\.(\w+)",
            "layers.{1}.blocks.{2}.mlp.fc2.{3}",
        ),
        (r"stages\.(\d)\.downsample\.(\w+)\.(\w+)", "layers.{1}.downsample.{2}.{3}"),
        (r"(norm\d)\.(\w+)", "{1}.{2}"),
        prefix=r"backbone\.",
        ours="backbone.",
    ),
    *table(
        (r"neck\.convs\.(\d+)\.conv\.(\w+)", "neck.lateral_convs.{1}.0.{2}"),
        (r"neck\.convs\.(\d+)\.gn\.(\w+)", "neck.lateral_convs.{1}.1.{2}"),
        (r"neck\.extra_convs\.(\d+)\.conv\.(\w+)", "neck.extra_convs.{1}.0.{2}"),
        (r"neck\.extra_convs\.(\d+)\.gn\.(\w+)", "neck.extra_convs.{1}.1.{2}"),
        (r"level_embed", "level_embed"),
        (r"query_embedding\.weight", "queries.embed.weight"),
        (r"reference_points_fc\.(\w+)", "queries.reference_points.{1}"),
        (r"memory_trans_fc\.(\w+)", "queries.enc_output.{1}"),
        (r"memory_trans_norm\.(\w+)", "queries.enc_output_norm.{1}"),
        (r"pos_trans_fc\.(\w+)", "queries.encode_box.linear.{1}"),
        (r"pos_trans_norm\.(\w+)", "queries.encode_box.norm.{1}"),
        (r"dn_query_generator\.label_embedding\.weight", "denoising.label_embed.weight"),
    ),
    *table(
        (r"self_attn\.(\w+\.\w+)", "self_attn.{2}"),
        (r"norms\.0\.(\w+)", "norm.{2}"),
        (r"norms\.1\.(\w+)", "ffn.norm.{2}"),
        (r"ffn\.layers\.0\.0\.(\w+)", "ffn.linear1.{2}"),
        (r"ffn\.layers\.1\.(\w+)", "ffn.linear2.{2}"),
        prefix=r"encoder\.layers\.(\d+)\.",
        ours="encoder.layers.{1}.",
    ),
    *table(
        (r"self_attn\.attn\.(.+)", "self_attn.{2}"),
        (r"cross_attn\.(\w+\.\w+)", "cross_attn.{2}"),
        (r"norms\.0\.(\w+)", "self_attn_norm.{2}"),
        (r"norms\.1\.(\w+)", "cross_attn_norm.{2}"),
        (r"norms\.2\.(\w+)", "ffn.norm.{2}"),
        (r"ffn\.layers\.0\.0\.(\w+)", "ffn.linear1.{2}"),
        (r"ffn\.layers\.1\.(\w+)", "ffn.linear2.{2}"),
        prefix=r"decoder\.layers\.(\d+)\.",
        ours="decoder.layers.{1}.",
    ),
    *table(
        (r"decoder\.norm\.(\w+)", "norm.{1}"),
        (r"decoder\.ref_point_head\.layers\.(\d)\.(\w+)", "query_pos.mlp.{1*2}.{2}"),
        (r"bbox_head\.cls_branches\.(\d+)\.(\w+)", "heads.class_embed.{1}.{2}"),
        (r"bbox_head\.reg_branches\.(\d+)\.(\d)\.(\w+)", "heads.bbox_embed.{1}.{2}.{3}"),
        ours="decoder.",
    ),
)
CONV = re.compile(r"(neck\.\w+_convs\.\d+\.0)\.weight")
MERGING = re.compile(r"backbone\.layers\.\d\.downsample\.(?:norm|reduction)\.\w+")
# The rows of Microsoft's Swin Transformer step through each 2x2 patch column by column.
COLUMN_FIRST = [0, 2, 1, 3]


def name_dino_queries(weights: Weights) -> Weights:
    """Take DINO's query embedding for content alone, as its positions come from references."""
    return {
        name.replace("queries.embed.", "queries.content."): weight
        for name, weight in weights.items()
    }


def add_biases(weights: Weights) -> Weights:
    """Add biases of zero to the neck's convolutions, which have none."""
    added = dict(weights)
    for name, weight in weights.items():
        if (match := CONV.fullmatch(name)) and f"{match[1]}.bias" not in weights:
            zeros = torch.zeros(len(weight.value), dtype=weight.value.dtype)
            added[f"{match[1]}.bias"] = Weight(
                zeros, (), "zeros, as MMDetection's convolution has no bias"
            )
    return added


def reorder_patches(weights: Weights) -> Weights:
    """Bring the inputs of patch merging to Microsoft's order, in which Detectron2 has them.

    MMDetection unfolds 2x2 patches: its channels are ``[C, 4]``, row by row within a patch.
    Microsoft's are ``[4, C]``, column by column.
    """

    def reorder(weight: Weight) -> Weight:
        inputs = weight.value.unflatten(-1, (-1, 4)).transpose(-1, -2)
        value = inputs[..., COLUMN_FIRST, :].flatten(-2).contiguous()
        return weight._replace(value=value)

    return {
        name: reorder(weight) if MERGING.fullmatch(name) else weight
        for name, weight in weights.items()
    }


def class_names(content: Any) -> list[str]:
    """Return the names of the classes in a checkpoint of MMDetection; empty if it has none."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    dataset = meta.get("dataset_meta") if isinstance(meta, Mapping) else None
    names = dataset.get("classes") if isinstance(dataset, Mapping) else None
    return list(names) if isinstance(names, (list, tuple)) else []


HEAD = r"bbox_head\.reg_branches\.0\.0\.weight"
MARKS = (HEAD, r"encoder\.layers\.0\.self_attn\.sampling_offsets\.", r"level_embed")
TWO_STAGE = r"memory_trans_fc\."
TEXT = "it reads text, and no detector here does"
DEFORMABLE_DETR = (
    images(),
    borders(1e-5),
    positions((10000, -0.5)),
    *losses(2.0, giou_eps=0.0, log_eps=1e-12),
)

# The first that recognises the keys counts.
SOURCES = (
    Source(
        "MMDetection's Grounding DINO",
        (HEAD, r"(language_model|text_feat_map)\."),
        (),
        refusal=TEXT,
    ),
    Source(
        "MMDetection's DDQ",
        (HEAD, r"query_map\."),
        (),
        refusal="it selects distinct queries by non-maximum suppression before every layer of its "
        "decoder, which DINO does not",
    ),
    Source(
        "MMDetection's DINO",
        (*MARKS, r"dn_query_generator\.label_embedding\."),
        RULES,
        settings=(
            images(),
            borders(1e-3, prediction_border=1e-5),
            positions((20, 0.0), (10000, -0.5)),
            *losses(1.0, 2.0, giou_eps=0.0, log_eps=1e-12),
        ),
        transforms=(add_biases, reorder_patches, name_dino_queries, *SEPARATE_HEADS),
        note="which position encoding they were trained with is not in the weights: MMDetection's "
        "dino-4scale_r50_improved has a temperature of 10000, all others 20",
    ),
    Source(
        "MMDetection's two-stage Deformable DETR",
        (*MARKS, TWO_STAGE, r"pos_trans_fc\."),
        RULES,
        settings=DEFORMABLE_DETR,
        transforms=(add_biases, reorder_patches, *TRANSFORMS),
    ),
    Source(
        "MMDetection's Deformable DETR",
        (*MARKS, r"reference_points_fc\."),
        RULES,
        settings=DEFORMABLE_DETR,
        transforms=(add_biases, reorder_patches, *TRANSFORMS),
    ),
    Source(
        "MMDetection 2",
        (r"bbox_head\.transformer\.",),
        (),
        refusal="its names are others; known are those of MMDetection 3, whose releases of the "
        "same detectors docs/checkpoints.md lists",
    ),
    Source(
        "another detector of MMDetection",
        (r"(bbox|rpn|roi|mask|panoptic)_head\.", r"backbone\."),
        (),
        refusal="known are its DINO and Deformable DETR",
    ),
)
