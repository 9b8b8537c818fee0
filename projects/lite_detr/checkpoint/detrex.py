"""The detectors of detrex (IDEA-Research/detrex), which are Detectron2 models with other names."""

from .rules import DETECTRON2_RESNET, SWIN, Source, table
from .settings import borders, images, losses, positions
from .transforms import SEPARATE_HEADS

RULES = (
    *table(*DETECTRON2_RESNET, *SWIN, prefix=r"backbone\.", ours="backbone."),
    *table(
        (r"neck\.convs\.(\d+)\.conv\.(\w+)", "neck.lateral_convs.{1}.0.{2}"),
        (r"neck\.convs\.(\d+)\.norm\.(\w+)", "neck.lateral_convs.{1}.1.{2}"),
        (r"neck\.extra_convs\.(\d+)\.conv\.(\w+)", "neck.extra_convs.{1}.0.{2}"),
        (r"neck\.extra_convs\.(\d+)\.norm\.(\w+)", "neck.extra_convs.{1}.1.{2}"),
        (r"transformer\.level_embeds", "level_embed"),
        (r"query_embedding\.weight", "queries.embed.weight"),
        (r"transformer\.tgt_embed\.weight", "queries.content.weight"),
        (r"transformer\.(reference_points|enc_output|enc_output_norm)\.(\w+)", "queries.{1}.{2}"),
        (r"transformer\.pos_trans\.(\w+)", "queries.encode_box.linear.{1}"),
        (r"transformer\.pos_trans_norm\.(\w+)", "queries.encode_box.norm.{1}"),
        (r"label_enc\.weight", "denoising.label_embed.weight"),
    ),
    *table(
        (r"attentions\.0\.(\w+\.\w+)", "self_attn.{2}"),
        (r"norms\.0\.(\w+)", "norm.{2}"),
        (r"norms\.1\.(\w+)", "ffn.norm.{2}"),
        (r"ffns\.0\.layers\.0\.0\.(\w+)", "ffn.linear1.{2}"),
        (r"ffns\.0\.layers\.1\.(\w+)", "ffn.linear2.{2}"),
        prefix=r"transformer\.encoder\.layers\.(\d+)\.",
        ours="encoder.layers.{1}.",
    ),
    *table(
        (r"attentions\.0\.attn\.(.+)", "self_attn.{2}"),
        (r"attentions\.1\.(\w+\.\w+)", "cross_attn.{2}"),
        (r"norms\.0\.(\w+)", "self_attn_norm.{2}"),
        (r"norms\.1\.(\w+)", "cross_attn_norm.{2}"),
        (r"norms\.2\.(\w+)", "ffn.norm.{2}"),
        (r"ffns\.0\.layers\.0\.0\.(\w+)", "ffn.linear1.{2}"),
        (r"ffns\.0\.layers\.1\.(\w+)", "ffn.linear2.{2}"),
        prefix=r"transformer\.decoder\.layers\.(\d+)\.",
        ours="decoder.layers.{1}.",
    ),
    *table(
        (r"transformer\.decoder\.norm\.(\w+)", "norm.{1}"),
        (r"transformer\.decoder\.ref_point_head\.layers\.(\d)\.(\w+)", "query_pos.mlp.{1*2}.{2}"),
        # The decoder refers to the heads, which are listed twice.
        (r"(?:transformer\.decoder\.)?class_embed\.(\d+)\.(\w+)", "heads.class_embed.{1}.{2}"),
        (
            r"(?:transformer\.decoder\.)?bbox_embed\.(\d+)\.layers\.(\d)\.(\w+)",
            "heads.bbox_embed.{1}.{2*2}.{3}",
        ),
        ours="decoder.",
    ),
)
MARKS = (
    r"transformer\.level_embeds",
    r"transformer\.encoder\.layers\.0\.attentions\.0\.sampling_offsets\.",
)
TWO_STAGE = r"transformer\.pos_trans\."
# The code clamps all references alike, and adds an epsilon to all of its overlaps.
COMMON = (images(), borders(1e-3))
GIOU_EPS = 1e-6
DEFORMABLE_DETR = (*COMMON, positions((10000, -0.5)), *losses(1.0, 2.0, giou_eps=GIOU_EPS))

# The first that recognises the keys counts.
SOURCES = (
    Source(
        "detrex's DINO",
        (*MARKS, r"transformer\.decoder\.ref_point_head\.", r"label_enc\."),
        RULES,
        settings=(
            *COMMON,
            positions((10000, -0.5), (20, 0.0)),
            *losses(1.0, 2.0, giou_eps=GIOU_EPS),
        ),
        transforms=SEPARATE_HEADS,
        note="which position encoding they were trained with is not in the weights: detrex's 24 "
        "epochs of R50 have a temperature of 20, all others 10000",
    ),
    Source(
        "detrex's H-Deformable-DETR",
        (*MARKS, TWO_STAGE, r"query_embedding\."),
        RULES,
        settings=DEFORMABLE_DETR,
    ),
    Source(
        "detrex's two-stage Deformable DETR",
        (*MARKS, TWO_STAGE),
        RULES,
        settings=DEFORMABLE_DETR,
    ),
    Source(
        "detrex's Deformable DETR with box refinement",
        (*MARKS, r"transformer\.reference_points\.", r"transformer\.decoder\.bbox_embed\."),
        RULES,
        settings=DEFORMABLE_DETR,
    ),
    Source(
        "detrex's single-stage Deformable DETR",
        (*MARKS, r"transformer\.reference_points\."),
        RULES,
        settings=DEFORMABLE_DETR,
    ),
)
