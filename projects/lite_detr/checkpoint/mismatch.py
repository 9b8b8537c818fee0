"""Explain why weights do not fit a model, and suggest a config of the model zoo that does."""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .. import model_zoo
from .rules import Source
from .settings import Setting

Shapes = Mapping[str, tuple[int, ...]]

ATTENTIONS = {"encoder": "self_attn", "decoder": "cross_attn"}
# The folders of the configs of detectors other than Deformable DETR.
FOLDERS = {"DINO": "dino/", "H-DETR": "h_detr/"}
PLAIN, KEY_AWARE = "MultiScaleDeformableAttention", "KeyAwareDeformableAttention"


class Signature(NamedTuple):
    """The facts that weights tell about a detector; two that differ need two configs.

    They do not tell how many scales of an interleaved encoder are high-level, as H3L1 and H2L2 have
    the same weights, nor the number of queries of a two-stage Deformable DETR.
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

    def differences(self, other: "Signature") -> dict[str, tuple]:
        """Return the fields in which two differ, with both values."""
        pairs = zip(self._fields, self, other)
        return {field: (mine, its) for field, mine, its in pairs if mine != its}


def read_signature(shapes: Mapping[str, tuple[int, ...]]) -> Signature | None:
    """Return the signature of a detector from the shapes of its weights under our names.

    None if they are not those of a complete detector.
    """

    def count(pattern: str) -> int:
        """Count the distinct values of a pattern's group."""
        return len({m[1] for name in shapes if (m := re.match(pattern, name))})

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in shapes)

    def attention(part: str) -> str:
        module = f"{part}.layers.0.{ATTENTIONS[part]}"
        if has(f"{module}.attention_weights."):
            return "plain"
        return "key-aware, with key_proj" if has(f"{module}.key_proj.") else "key-aware"

    required = ("level_embed", "encoder.layers.0.ffn.linear1.weight")
    if not all(name in shapes for name in required):
        return None
    layers, blocks = count(r"encoder\.layers\.(\d+)"), count(r"encoder\.low_level_ffns\.(\d+)")
    heads, decoder = count(r"decoder\.heads\.class_embed\.(\d+)"), count(r"decoder\.layers\.(\d+)")
    return Signature(
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
    """Return the meta-architecture, and how it makes its queries."""
    if any(name.startswith("decoder.query_pos.") for name in shapes):
        return "DINO"
    if "queries.encode_box.linear.weight" not in shapes:
        return "Deformable DETR with learned queries"
    return "H-DETR" if "queries.content.weight" in shapes else "two-stage Deformable DETR"


def backbone(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the kind of backbone and the number of blocks in each stage."""
    for kind, stage in (("ResNet", r"backbone\.(res\d)"), ("Swin", r"backbone\.(layers\.\d+)")):
        blocks: dict[str, set[str]] = {}
        for name in shapes:
            if match := re.match(stage + r"\.(?:blocks\.)?(\d+)\.", name):
                blocks.setdefault(match[1], set()).add(match[2])
        if blocks:
            depths = [len(blocks[name]) for name in sorted(blocks)]
            table = shapes.get("backbone.layers.0.blocks.0.attn.relative_position_bias_table")
            channels = shapes.get("backbone.patch_embed.proj.weight")
            if table is None or channels is None:
                return f"{kind} with {', '.join(map(str, depths))} blocks"
            return describe_swin(depths, channels[0], (math.isqrt(table[0]) + 1) // 2)
    return "another backbone"


def describe_swin(depths: Sequence[int], channels: int, window: int) -> str:
    """Return the sizes of a Swin Transformer, of which several have the same depths."""
    blocks = ", ".join(map(str, depths))
    return f"Swin with {blocks} blocks of {channels} channels, in windows of {window}"


def describe_mismatch(
    source: Source,
    left: list[str],
    missing: list[str],
    misshapen: list[str],
    constants: list[str],
    theirs: Shapes,
    mine: Shapes,
) -> str:
    """Return one line on how weights and model differ, and which config would fit.

    Args:
        source: the implementation.
        left: the file's keys without a counterpart in the model.
        missing: the model's names without a counterpart in the file.
        misshapen: our names of weights whose shapes differ.
        constants: what the source's code and the model compute with, where they differ.
        theirs, mine: the shapes of the file's weights and of the model's, by our names.
    """
    signature, wanted = read_signature(theirs), read_signature(mine)
    differences = signature.differences(wanted) if signature and wanted else {}
    parts = [
        f"{field.replace('_', ' ')} {given} in the weights and {expected} in the model"
        for field, (given, expected) in differences.items()
    ]
    parts += [
        f"{len(names)} keys {what} such as {names[0]}"
        for what, names in (("left over", left), ("missing", missing))
        if names
    ]
    if misshapen:
        name = misshapen[0]
        parts.append(
            f"{len(misshapen)} of another shape such as {name}, {theirs[name]} for {mine[name]}"
        )
    parts += constants
    message = f"weights of {source.name} do not fit the model: {'; '.join(parts)}"
    if signature is None or not (differences or constants):
        return message
    return f"{message}. {advice(signature, source)}"


def advice(signature: Signature, source: Source) -> str:
    """Return the configs to use instead."""
    settings = tuple(setting for setting in source.settings if not setting.in_losses)
    configs = suggest_configs(signature, settings)
    if not configs:
        return "No config of the model zoo fits them"
    fitting = f"They fit {' or '.join(configs)}"
    if len(configs) > 1 and source.note:
        fitting += f"; {source.note}"
    if "blocks" in signature.encoder:
        # H3L1 and H2L2 have the same weights.
        fitting += "; which scales are high-level is not in the weights, but in a release's name"
    return fitting


@functools.cache
def suggest_configs(signature: Signature, settings: tuple[Setting, ...]) -> tuple[str, ...]:
    """Return the configs that weights with this signature fit, each with the options it needs.

    Those with the fewest options; none if no options that this module knows make a config fit.

    Args:
        signature: that of the weights.
        settings: the constants that they were trained with.
    """
    found: dict[str, list[str]] = {}
    folder = FOLDERS.get(signature.detector, "deformable_detr/")
    for name, model, detector in candidates(folder, signature.backbone):
        differences = signature.differences(signature_of(detector))
        options = [list(needed_options(field, signature, model)) for field in differences]
        options += [setting.options() for setting in settings if not setting.fits(detector)]
        if all(options):
            found[name] = sorted({option for group in options for option in group})
    fewest = min(map(len, found.values()), default=0)
    return [" ".join([name, *options]) for name, options in found.items() if len(options) == fewest]


@functools.cache
def candidates(folder: str, backbone: str) -> list[tuple[str, DictConfig, nn.Module]]:
    """Return the configs of a folder whose backbone may be this one, with models and detectors.

    They are kept, as it takes seconds to build them, and weights often fail to fit twice.

    Args:
        folder: of the model zoo.
        backbone: as in :class:`Signature`.
    """
    found = []
    backbones: dict[str, nn.Module] = {}
    # Configs of several schedules have one model.
    detectors: dict[str, nn.Module] = {}
    for name in model_zoo.list_configs():
        if not name.startswith(folder):
            continue
        model = model_zoo.get_config(name).model
        if may_fit(model.backbone, backbone):
            key = str(OmegaConf.to_container(model))
            if key not in detectors:
                detectors[key] = build_without_memory(model, backbones)
            found.append((name, model, detectors[key]))
    for module in backbones.values():
        module.to("meta")
    return found


def may_fit(backbone: DictConfig, description: str) -> bool:
    """Tell whether a config's backbone may be the one described, before building its model."""
    kind = class_name(backbone)
    if kind != "SwinTransformer":
        return description.startswith(kind)
    # Large ones take seconds to build.
    sizes = backbone.embed_dim, backbone.get("window_size", 7)
    return description == describe_swin(backbone.depths, *sizes)


def class_name(node: Mapping) -> str:
    """Return the class of a lazy call, without its module."""
    target = node["_target_"]
    return target.rpartition(".")[2] if isinstance(target, str) else target.__name__


def build_without_memory(model: DictConfig, backbones: dict[str, nn.Module]) -> nn.Module:
    """Return a config's model, built without memory for its weights but for the backbone's.

    Args:
        model: the config's model.
        backbones: those built so far. They are built with real tensors, as Swin's constructor
            computes with them.
    """
    key = str(OmegaConf.to_container(model.backbone))
    if key not in backbones:
        backbones[key] = instantiate(model.backbone)
    with torch.device("meta"):
        return instantiate({**model, "backbone": backbones[key]})


def signature_of(detector: nn.Module) -> Signature | None:
    return read_signature(
        {name: tuple(value.shape) for name, value in detector.state_dict().items()}
    )


def needed_options(field: str, signature: Signature, model: DictConfig) -> Iterator[str]:
    """Yield the command line options that bring one field of a config to the signature."""
    layer = "model.encoder.layer"
    # The decoder's attention is the encoder's in the configs.
    alike = signature.encoder_attention == signature.decoder_attention
    if field in ("encoder_attention", "decoder_attention") and alike:
        kind = PLAIN if signature.encoder_attention == "plain" else KEY_AWARE
        if class_name(model.encoder.layer.attention) != kind:
            yield f"{layer}.attention._target_=lite_detr.modeling.{kind}"
        if signature.encoder_attention.endswith("key_proj"):
            yield f"{layer}.attention.key_proj=True"
    elif field == "num_levels":
        yield f"model.num_levels={signature.num_levels}"
    elif field == "backbone_maps" and signature.backbone.startswith("ResNet"):
        maps = ",".join(f"res{stage}" for stage in range(6 - signature.backbone_maps, 6))
        yield f"model.in_features=[{maps}]"
        yield f"model.backbone.out_features=[{maps}]"
    elif field == "ffn_width":
        yield f"{layer}.ffn.hidden_dim={signature.ffn_width}"
    elif field == "queries" and signature.detector == "H-DETR":
        # The releases that have more queries have more one-to-one queries.
        one_to_one, one_to_many = model.queries.num_queries, model.queries.num_one_to_many
        if signature.queries > one_to_one + one_to_many:
            yield f"model.queries.num_queries={signature.queries - one_to_many}"
        else:
            yield f"model.queries.num_one_to_many={signature.queries - one_to_one}"
    elif field == "queries":
        yield f"model.queries.num_queries={signature.queries}"
    elif field == "heads" and signature.detector == "DINO":
        yield f"model.decoder.heads.shared={signature.heads.startswith('1 for')}"
