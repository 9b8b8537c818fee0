"""Which config of the model zoo weights fit."""

import functools
from collections.abc import Iterator, Mapping

import torch
from detectron2.config import instantiate
from detectron2.utils.registry import _convert_target_to_string
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .. import model_zoo
from .facts import Facts, read_facts

META_ARCHITECTURES = {"DINO": "DINO", "H-DETR": "HDETR"}
PLAIN, KEY_AWARE = "MultiScaleDeformableAttention", "KeyAwareDeformableAttention"


@functools.cache
def suggest_configs(facts: Facts) -> tuple[str, ...]:
    """The configs that weights with these facts fit, each with the options it needs besides.

    Those with the fewest options; none where no options of this module's make a config fit.
    """
    found: dict[str, list[str]] = {}
    backbones: dict[str, nn.Module] = {}
    for name in model_zoo.list_configs():
        model = model_zoo.get_config(name).model
        if not may_fit(model, facts):
            continue
        differences = facts.differences(config_facts(model, backbones))
        options = [list(needed_options(field, facts, model)) for field in differences]
        if all(options):
            found[name] = sorted({option for group in options for option in group})
    fewest = min(map(len, found.values()), default=0)
    return [" ".join([name, *options]) for name, options in found.items() if len(options) == fewest]


def may_fit(model: DictConfig, facts: Facts) -> bool:
    """Whether detector and backbone are of the right kind, before the config is built."""
    return class_name(model) == META_ARCHITECTURES.get(
        facts.detector, "DeformableDETR"
    ) and facts.backbone.startswith(class_name(model.backbone).removesuffix("Transformer"))


def class_name(node: Mapping) -> str:
    """The class that a lazy call is of, without its module."""
    target = node["_target_"]
    name = target if isinstance(target, str) else _convert_target_to_string(target)
    return name.rsplit(".", 1)[-1]


def config_facts(model: DictConfig, backbones: dict[str, nn.Module]) -> Facts | None:
    """The facts of a config's model, built without memory for its weights.

    Args:
        model: the config's model.
        backbones: those built so far. They are built in earnest, as Swin's constructor computes
            with tensors.
    """
    key = str(OmegaConf.to_container(model.backbone))
    if key not in backbones:
        backbones[key] = instantiate(model.backbone)
    with torch.device("meta"):
        detector = instantiate({**model, "backbone": backbones[key]})
    return read_facts({name: tuple(value.shape) for name, value in detector.state_dict().items()})


def needed_options(field: str, facts: Facts, model: DictConfig) -> Iterator[str]:
    """The command line's options that bring one field of a config to the facts."""
    layer = "model.encoder.layer"
    # The decoder's attention is the encoder's, in the configs.
    alike = facts.encoder_attention == facts.decoder_attention
    if field in ("encoder_attention", "decoder_attention") and alike:
        kind = PLAIN if facts.encoder_attention == "plain" else KEY_AWARE
        if class_name(model.encoder.layer.attention) != kind:
            yield f"{layer}.attention._target_=lite_detr.modeling.{kind}"
        if facts.encoder_attention.endswith("key_proj"):
            yield f"{layer}.attention.key_proj=True"
    elif field == "num_levels":
        yield f"model.num_levels={facts.num_levels}"
    elif field == "backbone_maps" and facts.backbone.startswith("ResNet"):
        maps = ",".join(f"res{stage}" for stage in range(6 - facts.backbone_maps, 6))
        yield f"model.in_features=[{maps}]"
        yield f"model.backbone.out_features=[{maps}]"
    elif field == "ffn_width":
        yield f"{layer}.ffn.hidden_dim={facts.ffn_width}"
    elif field == "queries" and facts.detector == "H-DETR":
        yield f"model.queries.num_one_to_many={facts.queries - model.queries.num_queries}"
    elif field == "queries":
        yield f"model.queries.num_queries={facts.queries}"
    elif field == "heads" and facts.detector == "DINO":
        yield f"model.decoder.heads.shared={facts.heads.startswith('1 for')}"
