"""How other implementations name what this package holds.

A rule is a regular expression for a whole name and a template for ours, in which ``{1}`` is the
first group; ``{1+2}`` adds to a number and ``{1*2}`` multiplies it. The first rule that matches
counts. What one name alone cannot tell, such as which head makes the proposals, is left to
``transforms.py``; the names meant for it are ``neck.convs``, ``queries.embed``,
``low_level_ffn``, ``self_attn.q_proj`` and heads numbered beyond the decoder's layers.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

FIELD = re.compile(r"\{(\d)(?:([+*])(\d))?\}")


class Rule(NamedTuple):
    """The name ``pattern`` of another implementation is ``template`` here."""

    pattern: re.Pattern[str]
    template: str

    def apply(self, name: str) -> str | None:
        """Our name, or None where the rule says nothing about ``name``."""
        match = self.pattern.fullmatch(name)
        if match is None:
            return None

        def fill(field: re.Match[str]) -> str:
            group, operator, number = field.groups()
            text = match[int(group)]
            if operator is None:
                return text
            return str(int(text) + int(number) if operator == "+" else int(text) * int(number))

        return FIELD.sub(fill, self.template)


def table(*rows: tuple[str, str], prefix: str = "", ours: str = "") -> tuple[Rule, ...]:
    """Rules from (pattern, template), with what stands before every name there and here."""
    return tuple(Rule(re.compile(prefix + pattern), ours + name) for pattern, name in rows)


def rename(name: str, rules: Sequence[Rule]) -> str | None:
    """What the first rule that matches makes of a name, or None."""
    return next((ours for rule in rules if (ours := rule.apply(name)) is not None), None)


# Backbones. torchvision and timm name a ResNet alike.
TORCHVISION_RESNET = (
    (r"conv1\.weight", "stem.conv1.weight"),
    (r"bn1\.(\w+)", "stem.conv1.norm.{1}"),
    (r"layer(\d)\.(\d+)\.conv(\d)\.weight", "res{1+1}.{2}.conv{3}.weight"),
    (r"layer(\d)\.(\d+)\.bn(\d)\.(\w+)", "res{1+1}.{2}.conv{3}.norm.{4}"),
    (r"layer(\d)\.(\d+)\.downsample\.0\.weight", "res{1+1}.{2}.shortcut.weight"),
    (r"layer(\d)\.(\d+)\.downsample\.1\.(\w+)", "res{1+1}.{2}.shortcut.norm.{3}"),
)
TRANSFORMERS_RESNET = (
    (r"embedder\.embedder\.convolution\.weight", "stem.conv1.weight"),
    (r"embedder\.embedder\.normalization\.(\w+)", "stem.conv1.norm.{1}"),
    (
        r"encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.convolution\.weight",
        "res{1+2}.{2}.conv{3+1}.weight",
    ),
    (
        r"encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.normalization\.(\w+)",
        "res{1+2}.{2}.conv{3+1}.norm.{4}",
    ),
    (
        r"encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.convolution\.weight",
        "res{1+2}.{2}.shortcut.weight",
    ),
    (
        r"encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.normalization\.(\w+)",
        "res{1+2}.{2}.shortcut.norm.{3}",
    ),
)
DETECTRON2_RESNET = ((r"((?:stem\.conv|res\d).+)", "{1}"),)
SWIN = ((r"((?:patch_embed|layers|norm\d)\..+)", "{1}"),)

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
