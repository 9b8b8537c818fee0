"""What each backbone of ``configs/common/backbones`` costs a detector, and how it is swapped in."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from detectron2.config import instantiate
from detectron2.utils.registry import _convert_target_to_string
from omegaconf import DictConfig
from tqdm import tqdm

from lite_detr import model_zoo
from lite_detr.analysis.flops import ModelCost, count_cost

FULL = "dino/dino_r50_4scale_36ep.py"
LITE = "dino/lite_dino_r50_h3l1_2p1x3_36ep.py"
# What a file may say of the images that its backbone's weights were trained with.
IMAGE_FIELDS = ("pixel_mean", "pixel_std", "input_format")
# Of the backbones that fetch weights themselves, the option that lets them.
OWN_WEIGHTS = {"TimmBackbone": "pretrained = True", "TorchvisionBackbone": 'weights = "DEFAULT"'}


class Row(NamedTuple):
    """A backbone with the full and with the lite encoder."""

    name: str
    full: ModelCost
    lite: ModelCost


def backbone_names() -> list[str]:
    """The backbones by source and name, as the table lists them."""
    return sorted(model_zoo.list_backbones(), key=lambda name: (source(name).lower(), name))


def read(name: str, *fields: str) -> dict[str, object]:
    """Those fields of a backbone's file that it has."""
    return model_zoo.get_fields(f"{model_zoo.BACKBONES}/{name}.py", *fields)


def target(name: str) -> str:
    """The class of a backbone, with the module that it is in."""
    return _convert_target_to_string(read(name, "backbone")["backbone"]._target_)


def source(name: str) -> str:
    """The library that a backbone comes from."""
    adapters = {"TimmBackbone": "timm", "TorchvisionBackbone": "torchvision"}
    return adapters.get(target(name).rsplit(".", 1)[-1], "Detectron2")


def swap_lines(name: str) -> list[str]:
    """The lines of a config that put a backbone and its weights into ``model`` and ``train``."""
    fields = read(name, "backbone", "init_checkpoint", *IMAGE_FIELDS)
    imported = ", ".join(sorted(fields))
    lines = [f"from ..{model_zoo.BACKBONES.replace('/', '.')}.{name} import {imported}"]
    lines += [
        f"model.{field} = {field}" for field in ("backbone", *IMAGE_FIELDS) if field in fields
    ]
    if "input_format" in fields:
        lines.append("dataloader.train.mapper.image_format = input_format")
    fetch = OWN_WEIGHTS.get(target(name).rsplit(".", 1)[-1])
    if fetch and "state_dict" not in fields["backbone"]:
        lines.append(f"model.backbone.{fetch}")
    checkpoint = "init_checkpoint" if "init_checkpoint" in fields else '""'
    return [*lines, f"train.init_checkpoint = {checkpoint}"]


def swapped(model_config: str, name: str) -> DictConfig:
    """The model of a config with another backbone, without weights that would be downloaded."""
    model = model_zoo.get_config(model_config).model
    for field, value in read(name, "backbone", *IMAGE_FIELDS).items():
        model[field] = value
    return model


def backbone_rows(height: int, width: int) -> Iterator[Row]:
    for name in tqdm(backbone_names()):
        costs = (
            count_cost(instantiate(swapped(config, name)), height, width) for config in (FULL, LITE)
        )
        yield Row(name, *costs)


def backbone_table(rows: Iterable[Row]) -> str:
    lines = [
        "| source | backbone | config lines | backbone, GFLOPs "
        "| full: GFLOPs | encoder | params (M) | lite: GFLOPs | encoder | params (M) |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, full, lite in rows:
        cells = [
            source(name),
            f"[`{name}`](../configs/{model_zoo.BACKBONES}/{name}.py)",
            "<br>".join(f"`{line}`" for line in swap_lines(name)),
            f"{full.flops['backbone'] / 1e9:.1f}",
        ]
        for cost in (full, lite):
            cells += [f"{cost.flops[part] / 1e9:.1f}" for part in ("total", "encoder")]
            cells.append(f"{cost.parameters / 1e6:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
