"""Other implementations: how to recognise their weights, and what their names are here.

What one name alone cannot tell, such as which head makes the proposals, is left to
``transforms.py``; the names meant for it are ``neck.convs``, ``queries.embed``,
``low_level_ffn``, ``self_attn.q_proj`` and heads numbered beyond the decoder's layers. detrex and
MMDetection, each with several detectors, have files of their own.
"""

from collections.abc import Collection

from . import detrex, mmdetection
from .baselines import BASELINES, SPARSE
from .rules import (
    DETECTRON2_RESNET,
    SWIN,
    TORCHVISION_RESNET,
    TRANSFORMERS_RESNET,
    Source,
    table,
)
from .settings import borders, images, losses, positions

# The authors' Deformable DETR, and what DINO, Lite-DINO and H-DETR made of it.
AUTHORS = (
    *table(*TORCHVISION_RESNET, prefix=r"backbone\.0\.body\.", ours="backbone."),
    *table(*SWIN, prefix=r"backbone\.0\.(?:body\.)?", ours="backbone."),
    *table(
        (r"input_proj\.(\d+\..+)", "neck.convs.{1}"),
        (r"transformer\.level_embed", "level_embed"),
        (r"query_embed\.weight", "queries.embed.weight"),
        (r"transformer\.tgt_embed\.weight", "queries.content.weight"),
        (r"transformer\.(reference_points|enc_output|enc_output_norm)\.(\w+)", "queries.{1}.{2}"),
        (r"transformer\.pos_trans\.(\w+)", "queries.encode_box.linear.{1}"),
        (r"transformer\.pos_trans_norm\.(\w+)", "queries.encode_box.norm.{1}"),
        (r"transformer\.enc_out_class_embed\.(\w+)", "queries.class_embed.{1}"),
        (r"transformer\.enc_out_bbox_embed\.layers\.(\d)\.(\w+)", "queries.bbox_embed.{1*2}.{2}"),
        (r"label_enc\.weight", "denoising.label_embed.weight"),
    ),
    *table(
        (r"self_attn\.(\w+\.\w+)", "self_attn.{2}"),
        (r"norm1\.(\w+)", "norm.{2}"),
        (r"norm2\.(\w+)", "ffn.norm.{2}"),
        (r"linear([12])\.(\w+)", "ffn.linear{2}.{3}"),
        # Lite-DINO's feed-forward network for the low-level scale.
        (r"linear([12])2\.(\w+)", "low_level_ffn.linear{2}.{3}"),
        (r"norm22\.(\w+)", "low_level_ffn.norm.{2}"),
        prefix=r"transformer\.encoder\.layers\.(\d+)\.",
        ours="encoder.layers.{1}.",
    ),
    *table(
        (r"((?:self|cross)_attn\..+)", "{2}"),
        (r"norm1\.(\w+)", "cross_attn_norm.{2}"),
        (r"norm2\.(\w+)", "self_attn_norm.{2}"),
        (r"norm3\.(\w+)", "ffn.norm.{2}"),
        (r"linear([12])\.(\w+)", "ffn.linear{2}.{3}"),
        prefix=r"transformer\.decoder\.layers\.(\d+)\.",
        ours="decoder.layers.{1}.",
    ),
    *table(
        (r"transformer\.decoder\.norm\.(\w+)", "norm.{1}"),
        (r"transformer\.decoder\.ref_point_head\.layers\.(\d)\.(\w+)", "query_pos.mlp.{1*2}.{2}"),
        # Heads that the decoder refers to are listed twice.
        (r"(?:transformer\.decoder\.)?class_embed\.(\d+)\.(\w+)", "heads.class_embed.{1}.{2}"),
        (
            r"(?:transformer\.decoder\.)?bbox_embed\.(\d+)\.layers\.(\d)\.(\w+)",
            "heads.bbox_embed.{1}.{2*2}.{3}",
        ),
        ours="decoder.",
    ),
)

# Deformable DETR of `transformers`, as its versions 4 and 5 save it.
TRANSFORMERS_BACKBONE = r"model\.backbone\.(?:conv_encoder\.)?model\."
TRANSFORMERS = (
    *table(*TORCHVISION_RESNET, prefix=TRANSFORMERS_BACKBONE, ours="backbone."),
    *table(*TRANSFORMERS_RESNET, prefix=TRANSFORMERS_BACKBONE, ours="backbone."),
    *table(
        (r"model\.input_proj\.(\d+\..+)", "neck.convs.{1}"),
        (r"model\.level_embed", "level_embed"),
        (r"model\.query_position_embeddings\.weight", "queries.embed.weight"),
        (r"model\.(reference_points|enc_output|enc_output_norm)\.(\w+)", "queries.{1}.{2}"),
        (r"model\.pos_trans\.(\w+)", "queries.encode_box.linear.{1}"),
        (r"model\.pos_trans_norm\.(\w+)", "queries.encode_box.norm.{1}"),
    ),
    *table(
        (r"self_attn\.(\w+\.\w+)", "self_attn.{2}"),
        (r"self_attn_layer_norm\.(\w+)", "norm.{2}"),
        (r"(?:mlp\.)?fc([12])\.(\w+)", "ffn.linear{2}.{3}"),
        (r"final_layer_norm\.(\w+)", "ffn.norm.{2}"),
        prefix=r"model\.encoder\.layers\.(\d+)\.",
        ours="encoder.layers.{1}.",
    ),
    *table(
        (r"self_attn\.([qkv]_proj)\.(\w+)", "self_attn.{2}.{3}"),
        (r"self_attn\.o(?:ut)?_proj\.(\w+)", "self_attn.out_proj.{2}"),
        (r"self_attn_layer_norm\.(\w+)", "self_attn_norm.{2}"),
        (r"encoder_attn\.(\w+\.\w+)", "cross_attn.{2}"),
        (r"encoder_attn_layer_norm\.(\w+)", "cross_attn_norm.{2}"),
        (r"(?:mlp\.)?fc([12])\.(\w+)", "ffn.linear{2}.{3}"),
        (r"final_layer_norm\.(\w+)", "ffn.norm.{2}"),
        prefix=r"model\.decoder\.layers\.(\d+)\.",
        ours="decoder.layers.{1}.",
    ),
    *table(
        (r"class_embed\.(\d+)\.(\w+)", "class_embed.{1}.{2}"),
        (r"bbox_embed\.(\d+)\.layers\.(\d)\.(\w+)", "bbox_embed.{1}.{2*2}.{3}"),
        prefix=r"(?:model\.decoder\.)?",
        ours="decoder.heads.",
    ),
)


CLASSIFIER = "belongs to the classifier that the backbone was trained in"
TWO_STAGE = r"transformer\.pos_trans\."
DINO = r"transformer\.decoder\.ref_point_head\."

OF_DINO = (images(), borders(1e-3), positions((20, 0.0)), *losses(1.0, giou_eps=1e-6))
OF_DEFORMABLE_DETR = (
    images(),
    borders(1e-5),
    positions((10000, -0.5)),
    *losses(2.0, giou_eps=0.0),
)

# The first that recognises the keys counts.
SOURCES = (
    # Their names are partly those of the authors.
    *detrex.SOURCES,
    *mmdetection.SOURCES,
    *BASELINES,
    Source("Sparse DETR", (r"transformer\.enc_mask_predictor\.",), (*SPARSE, *AUTHORS)),
    Source(
        "Lite-DINO",
        (DINO, r"transformer\.encoder\.layers\.\d+\.(linear12|self_attn\.query_proj)\."),
        AUTHORS,
        settings=OF_DINO,
    ),
    Source("DINO", (DINO,), AUTHORS, settings=OF_DINO),
    Source("H-DETR", (TWO_STAGE, r"query_embed\."), AUTHORS, settings=OF_DEFORMABLE_DETR),
    Source("two-stage Deformable DETR", (TWO_STAGE,), AUTHORS, settings=OF_DEFORMABLE_DETR),
    Source(
        "Deformable DETR with box refinement",
        (r"transformer\.reference_points\.", r"transformer\.decoder\.bbox_embed\."),
        AUTHORS,
        settings=OF_DEFORMABLE_DETR,
    ),
    Source(
        "single-stage Deformable DETR",
        (r"transformer\.reference_points\.",),
        AUTHORS,
        settings=OF_DEFORMABLE_DETR,
    ),
    Source(
        "transformers' Deformable DETR",
        (
            r"model\.encoder\.layers\.\d+\.self_attn\.sampling_offsets\.",
            # Without it, others in a wrapper that calls them `model` have such names.
            r"model\.input_proj\.",
        ),
        TRANSFORMERS,
        settings=OF_DEFORMABLE_DETR,
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
    """Return the implementation that keys belong to; None if it is not in :data:`SOURCES`."""
    return next((source for source in SOURCES if source.recognises(keys)), None)
