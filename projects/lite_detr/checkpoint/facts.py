"""What names and shapes tell about a detector, whether of a file's weights or of a model."""

import re
from collections.abc import Mapping
from typing import NamedTuple

ATTENTIONS = {"encoder": "self_attn", "decoder": "cross_attn"}


class Facts(NamedTuple):
    """What can be read off the weights of a detector; two that differ need two configs.

    How many scales of an interleaved encoder are high-level cannot be: H3L1 and H2L2 have the same
    weights. Nor can the queries of a two-stage Deformable DETR be counted.
    """

    detector: str
    heads: str
    backbone: str
    num_levels: int
    backbone_maps: int
    encoder: str
    encoder_attention: str
    decoder_attention: str
    embed_dim: int
    ffn_width: int
    queries: int | None

    def differences(self, other: "Facts") -> dict[str, tuple]:
        """The fields in which two differ, with both values."""
        pairs = zip(self._fields, self, other)
        return {field: (mine, its) for field, mine, its in pairs if mine != its}


def read_facts(shapes: Mapping[str, tuple[int, ...]]) -> Facts | None:
    """The facts of a detector from the shapes of its weights under our names.

    None where they are not a whole detector's.
    """

    def count(pattern: str) -> int:
        """How many numbers there are at the group of a pattern."""
        return len({m[1] for name in shapes if (m := re.match(pattern, name))})

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in shapes)

    def attention(part: str) -> str:
        module = f"{part}.layers.0.{ATTENTIONS[part]}"
        if has(f"{module}.attention_weights."):
            return "plain"
        return "key-aware, with key_proj" if has(f"{module}.key_proj.") else "key-aware"

    whole = ("level_embed", "encoder.layers.0.ffn.linear1.weight")
    if not all(name in shapes for name in whole):
        return None
    layers, blocks = count(r"encoder\.layers\.(\d+)"), count(r"encoder\.low_level_ffns\.(\d+)")
    heads, decoder = count(r"decoder\.heads\.class_embed\.(\d+)"), count(r"decoder\.layers\.(\d+)")
    return Facts(
        detector=detector(shapes),
        heads=f"{heads} for {decoder} layers",
        backbone=backbone(shapes),
        num_levels=shapes["level_embed"][0],
        backbone_maps=count(r"neck\.lateral_convs\.(\d+)"),
        encoder=f"{blocks} blocks of {layers // blocks}" if blocks else f"{layers} layers",
        encoder_attention=attention("encoder"),
        decoder_attention=attention("decoder"),
        embed_dim=shapes["level_embed"][1],
        ffn_width=shapes["encoder.layers.0.ffn.linear1.weight"][0],
        queries=shapes.get("queries.content.weight", (None,))[0],
    )


def detector(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Which of the meta-architectures, and how it makes its queries."""
    if any(name.startswith("decoder.query_pos.") for name in shapes):
        return "DINO"
    if "queries.encode_box.linear.weight" not in shapes:
        return "Deformable DETR with learned queries"
    return "H-DETR" if "queries.content.weight" in shapes else "two-stage Deformable DETR"


def backbone(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The kind of backbone and its blocks in each stage."""
    for kind, stage in (("ResNet", r"backbone\.(res\d)"), ("Swin", r"backbone\.(layers\.\d+)")):
        blocks: dict[str, set[str]] = {}
        for name in shapes:
            if match := re.match(stage + r"\.(?:blocks\.)?(\d+)\.", name):
                blocks.setdefault(match[1], set()).add(match[2])
        if blocks:
            depths = ", ".join(str(len(blocks[name])) for name in sorted(blocks))
            return f"{kind} with {depths} blocks"
    return "another backbone"
