"""The released weights of the detectors in ``lite_detr.baselines``, by their authors' names."""

from .rules import TORCHVISION_RESNET, Source, table

BACKBONE = table(*TORCHVISION_RESNET, prefix=r"backbone\.0\.body\.", ours="backbone.")
# The separate projections of Conditional DETR, and of what was made of its code.
SPLIT_SELF_ATTENTION = (
    (r"sa_qcontent_proj\.(\w+)", "self_attn.query_content.{2}"),
    (r"sa_qpos_proj\.(\w+)", "self_attn.query_pos.{2}"),
    (r"sa_kcontent_proj\.(\w+)", "self_attn.key_content.{2}"),
    (r"sa_kpos_proj\.(\w+)", "self_attn.key_pos.{2}"),
    (r"sa_v_proj\.(\w+)", "self_attn.value.{2}"),
    (r"self_attn\.out_proj\.(\w+)", "self_attn.output_proj.{2}"),
)
CONDITIONAL = (
    *table(
        *SPLIT_SELF_ATTENTION,
        (r"ca_qcontent_proj\.(\w+)", "cross_attn.query_content.{2}"),
        (r"ca_qpos_proj\.(\w+)", "cross_attn.query_pos.{2}"),
        (r"ca_kcontent_proj\.(\w+)", "cross_attn.key_content.{2}"),
        (r"ca_kpos_proj\.(\w+)", "cross_attn.key_pos.{2}"),
        (r"ca_v_proj\.(\w+)", "cross_attn.value.{2}"),
        (r"ca_qpos_sine_proj\.(\w+)", "cross_attn.query_place.{2}"),
        (r"cross_attn\.out_proj\.(\w+)", "cross_attn.output_proj.{2}"),
        prefix=r"transformer\.decoder\.layers\.(\d+)\.",
        ours="decoder.layers.{1}.",
    ),
    *table(
        (r"decoder\.query_scale\.layers\.(\d)\.(\w+)", "decoder.place_scale.{1*2}.{2}"),
        (r"decoder\.ref_anchor_head\.layers\.(\d)\.(\w+)", "decoder.size_head.{1*2}.{2}"),
        (r"encoder\.query_scale\.layers\.(\d)\.(\w+)", "encoder.pos_scale.{1*2}.{2}"),
        (r"patterns\.weight", "queries.patterns.weight"),
        prefix=r"transformer\.",
    ),
    *table(
        (r"refpoint_embed\.weight", "anchor_logits.weight"),
        (r"label_enc\.weight", "label_embed.weight"),
        ours="queries.",
    ),
)
ANCHOR_HEAD = r"transformer\.decoder\.ref_anchor_head\."
POINT_HEAD = r"transformer\.decoder\.ref_point_head\.layers\.(\d)\.(\w+)"
# What all detectors share that were made of DETR's code.
SHARED = (
    *BACKBONE,
    *table(
        (r"input_proj\.(\w+)", "neck.lateral_convs.0.{1}"),
        (r"query_embed\.weight", "queries.pos.weight"),
    ),
    *table(
        (r"self_attn\.(in_proj_\w+|out_proj\.\w+)", "self_attn.attention.{2}"),
        (r"norm1\.(\w+)", "norm.{2}"),
        (r"norm2\.(\w+)", "ffn.norm.{2}"),
        (r"linear([12])\.(\w+)", "ffn.linear{2}.{3}"),
        (r"activation\.weight", "ffn.activation.weight"),
        prefix=r"transformer\.encoder\.layers\.(\d+)\.",
        ours="encoder.layers.{1}.",
    ),
    *table(
        (r"self_attn\.(.+)", "self_attn.{2}"),
        (r"multihead_attn\.(.+)", "cross_attn.attention.{2}"),
        (r"norm1\.(\w+)", "self_attn_norm.{2}"),
        (r"norm2\.(\w+)", "cross_attn_norm.{2}"),
        (r"norm3\.(\w+)", "ffn.norm.{2}"),
        (r"linear([12])\.(\w+)", "ffn.linear{2}.{3}"),
        (r"activation\.weight", "ffn.activation.weight"),
        prefix=r"transformer\.decoder\.layers\.(\d+)\.",
        ours="decoder.layers.{1}.",
    ),
    *table(
        (r"transformer\.decoder\.norm\.(\w+)", "norm.{1}"),
        (r"class_embed\.(\w+)", "heads.class_embed.0.{1}"),
        (
            r"(?:transformer\.decoder\.)?bbox_embed\.layers\.(\d)\.(\w+)",
            "heads.bbox_embed.0.{1*2}.{2}",
        ),
        ours="decoder.",
    ),
)
# Sparse DETR's heads: those of the decoder, of the proposals, and of the first encoder layers.
FIRST_ENCODER_HEAD = 7
SPARSE = (
    *table(
        (r"layer1\.(\d)\.(\w+)", "mix.{1}.{2}"),
        (r"layer2\.(\d)\.(\w+)", "score.{1}.{2}"),
        prefix=r"transformer\.enc_mask_predictor\.",
        ours="encoder.scorer.",
    ),
    *table(
        (r"class_embed\.(\d)\.(\w+)", "class_embed.{1}.{2}"),
        (r"bbox_embed\.(\d)\.layers\.(\d)\.(\w+)", "bbox_embed.{1}.{2*2}.{3}"),
        prefix=r"transformer\.encoder\.",
        ours="encoder_heads.",
    ),
    *(
        rule
        for layer in range(5)
        for rule in table(
            (rf"class_embed\.{FIRST_ENCODER_HEAD + layer}\.(\w+)", f"class_embed.{layer}.{{1}}"),
            (
                rf"bbox_embed\.{FIRST_ENCODER_HEAD + layer}\.layers\.(\d)\.(\w+)",
                f"bbox_embed.{layer}.{{1*2}}.{{2}}",
            ),
            prefix=r"(?:transformer\.decoder\.)?",
            ours="encoder_heads.",
        )
    ),
)
ANCHORS = (*table((POINT_HEAD, "decoder.query_pos.mlp.{1*2}.{2}")), *CONDITIONAL, *SHARED)
ANCHOR_DETR = (
    *table(*TORCHVISION_RESNET, prefix=r"backbone\.body\.", ours="backbone."),
    *table(
        (r"input_proj\.0\.(\d\.\w+)", "neck.lateral_convs.0.{1}"),
        (r"transformer\.pattern\.weight", "queries.patterns.weight"),
        (r"transformer\.position\.weight", "queries.points.weight"),
        (r"transformer\.adapt_pos1d\.(.+)", "position_encoding.axis_mlp.{1}"),
        (r"transformer\.adapt_pos2d\.(.+)", "position_encoding.point_mlp.{1}"),
    ),
    *table(
        (r"self_attn\.in_proj_(\w+)", "self_attn.in_proj.{2}"),
        (r"self_attn\.out_proj\.(\w+)", "self_attn.output_proj.{2}"),
        (r"norm1\.(\w+)", "norm.{2}"),
        (r"ffn\.linear([12])\.(\w+)", "ffn.linear{2}.{3}"),
        (r"ffn\.norm2\.(\w+)", "ffn.norm.{2}"),
        prefix=r"transformer\.encoder_layers\.(\d+)\.",
        ours="encoder.layers.{1}.",
    ),
    *table(
        (r"cross_attn\.in_proj_(\w+)", "cross_attn.in_proj.{2}"),
        (r"cross_attn\.out_proj\.(\w+)", "cross_attn.output_proj.{2}"),
        (r"self_attn\.(.+)", "self_attn.{2}"),
        (r"norm1\.(\w+)", "cross_attn_norm.{2}"),
        (r"norm2\.(\w+)", "self_attn_norm.{2}"),
        (r"ffn\.linear([12])\.(\w+)", "ffn.linear{2}.{3}"),
        (r"ffn\.norm2\.(\w+)", "ffn.norm.{2}"),
        prefix=r"transformer\.decoder_layers\.(\d+)\.",
        ours="decoder.layers.{1}.",
    ),
    *table(
        (r"class_embed\.(\d)\.(\w+)", "class_embed.{1}.{2}"),
        (r"bbox_embed\.(\d)\.layers\.(\d)\.(\w+)", "bbox_embed.{1}.{2*2}.{3}"),
        prefix=r"transformer\.",
        ours="decoder.heads.",
    ),
)
IMFA = (
    *table(
        *SPLIT_SELF_ATTENTION,
        prefix=r"transformer\.encoder\.layers\.(\d+)\.",
        ours="encoder.layers.{1}.",
    ),
    *table(
        (r"sampling_pt\.layers\.(\d)\.(\w+)", "sampler.points.{1*2}.{2}"),
        (r"dynamic_layer\.(\w+)", "sampler.matrices.{1}"),
        (r"dynamic_norm([12])\.(\w+)", "sampler.norm{1}.{2}"),
        (r"level_embed", "level_embed"),
        (r"class_embed\.(\w+)", "decoder.heads.class_embed.0.{1}"),
        prefix=r"transformer\.",
    ),
    *table((r"projs\.(\d)\.(\w+)", "neck.lateral_convs.{1}.{2}")),
    *ANCHORS,
)
PNP_DETR = (
    *table(
        (r"score_pred_net\.(\d\.\w+)", "score.{1}"),
        (r"k_proj\.(\w+)", "weights.{1}"),
        (r"v_proj\.(\w+)", "value.{1}"),
        prefix=r"transformer\.sampler\.",
        ours="sampler.",
    ),
    *SHARED,
)

BASELINES = (
    Source(
        "Anchor DETR", (r"transformer\.encoder_layers\.", r"transformer\.position\."), ANCHOR_DETR
    ),
    Source("PnP-DETR", (r"transformer\.sampler\.",), PNP_DETR),
    Source("DETR", (r"transformer\.decoder\.layers\.\d+\.multihead_attn\.",), SHARED),
    Source("IMFA", (ANCHOR_HEAD, r"transformer\.sampling_pt\."), IMFA),
    Source("DN-DETR", (ANCHOR_HEAD, r"label_enc\."), ANCHORS),
    Source("DAB-DETR", (ANCHOR_HEAD,), ANCHORS),
    Source(
        "Conditional DETR",
        (r"transformer\.decoder\.layers\.\d+\.ca_qcontent_proj\.",),
        (*table((POINT_HEAD, "queries.reference_points.{1*2}.{2}")), *CONDITIONAL, *SHARED),
    ),
)
