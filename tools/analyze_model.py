#!/usr/bin/env python
"""Count the multiply-adds, parameters and tokens of the model zoo's detectors.

analyze_model.py dino/lite_dino_r50_h3l1_2p1x3_36ep.py      # one or several configs
analyze_model.py --all --markdown docs/MODEL_ZOO.md         # rewrite the tables in a page
analyze_model.py --backbones --markdown docs/backbones.md   # two models with all backbones
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from detectron2.config import instantiate
from detectron2.utils.registry import locate
from omegaconf import DictConfig
from tqdm import tqdm

from lite_detr import cli, model_zoo
from lite_detr.analysis.flops import PARTS, ModelCost, count_cost
from lite_detr.analysis.markdown_page import page, write_tables

REPORTED = Path(__file__).with_name("reported.json")
FAMILIES = {
    "deformable_detr": "Deformable DETR",
    "dino": "DINO",
    "h_detr": "H-DETR",
    "baselines": "Models to compare with",
}
# What the names of configs for weights of other model zoos begin with.
OTHER_ZOOS = ("detrex_", "mmdet_")
# The models that are counted with each backbone.
FULL = "dino/dino_r50_4scale_36ep.py"
LITE = "dino/lite_dino_r50_h3l1_2p1x3_36ep.py"
# What a backbone's file may say of the images that its weights were trained with.
IMAGE_FIELDS = ("pixel_mean", "pixel_std", "input_format")
NONE = "–"
LIBRARIES = {"TimmBackbone": "timm", "TorchvisionBackbone": "torchvision"}


def analyze(name: str, height: int, width: int) -> ModelCost:
    """Return the cost of one config, with COCO's classes unless the config has others."""
    return count_cost(instantiate(model_zoo.get_config(name).model), height, width)


def is_row(name: str) -> bool:
    """Tell whether the tables have a row for a config: not if it is another zoo's form of one."""
    family, file = name.split("/")
    return family in FAMILIES and not file.startswith(OTHER_ZOOS)


def cost_cells(cost: ModelCost) -> list[str]:
    flops = [cost.flops[part] / 1e9 for part in ("total", *PARTS)]
    return [f"{value:.1f}" for value in flops] + [f"{cost.parameters / 1e6:.2f}"]


def text_table(costs: dict[str, ModelCost]) -> str:
    header = ["config", "GFLOPs", *PARTS, "params (M)", "tokens of each scale"]
    rows = [header]
    for name, cost in costs.items():
        share = ", ".join(f"{n} ({n / sum(cost.tokens):.1%})" for n in cost.tokens)
        rows.append([name, *cost_cells(cost), share])
    widths = [max(len(line[column]) for line in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in rows
    )


def markdown_tables(costs: dict[str, ModelCost], size: str) -> str:
    """Return a table for each family: our counts beside what the paper reports."""
    rows = json.loads(REPORTED.read_text())["rows"]
    reported = {entry["config"]: entry for entry in rows if "config" in entry}
    parts = []
    for folder, title in FAMILIES.items():
        parts += [
            f"### {title}",
            "",
            f"| config in `{folder}/` | GFLOPs | encoder | params (M) "
            "| reported GFLOPs | reported encoder | reported AP |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for name, cost in costs.items():
            if not name.startswith(f"{folder}/"):
                continue
            total, _, encoder, _, parameters = cost_cells(cost)
            cells = [f"`{name.split('/')[1]}`", total, encoder, parameters]
            parts.append(markdown_row(cells + reported_cells(reported.get(name, {}))))
        parts.append("")
    # The rows of the paper's tables that have no config.
    for entry in rows:
        if "config" not in entry:
            name = ", ".join(filter(None, (entry["model"], entry["backbone"])))
            parts.insert(-1, markdown_row([name, NONE, NONE, NONE, *reported_cells(entry)]))
    for tokens in sorted({cost.tokens for cost in costs.values()}, reverse=True):
        if len(tokens) > 1:
            shares = ", ".join(f"{count} ({count / sum(tokens):.1%})" for count in tokens)
            parts.append(f"At {size}, {len(tokens)} scales have {shares} tokens.")
    return "\n".join(parts)


def reported_cells(entry: dict) -> list[str]:
    """Return what the paper reports of a row: GFLOPs, those of the encoder, and AP."""
    figures = [entry.get(key) for key in ("GFLOPs", "encoder_GFLOPs", "AP")]
    return [NONE if figure is None else str(figure) for figure in figures]


def markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


class BackboneCosts(NamedTuple):
    """The cost of a backbone in the full and in the lite model."""

    name: str
    full: ModelCost
    lite: ModelCost


def backbone_names() -> list[str]:
    """Return the backbones sorted by library and name, as the table lists them."""
    names = model_zoo.list_backbones()
    return sorted(names, key=lambda name: (backbone_library(name).lower(), name))


def read_backbone(name: str, *fields: str) -> dict[str, object]:
    """Return those of the fields that a backbone's file has."""
    return model_zoo.get_fields(f"{model_zoo.BACKBONES}/{name}.py", *fields)


def backbone_class(name: str) -> str:
    """Return the name of a backbone's class."""
    target = read_backbone(name, "backbone")["backbone"]._target_
    return (locate(target) if isinstance(target, str) else target).__name__


def backbone_library(name: str) -> str:
    """Return the library that a backbone comes from."""
    return LIBRARIES.get(backbone_class(name), "Detectron2")


def swap_backbone(model_config: str, name: str) -> DictConfig:
    """Return a config's model with another backbone, without weights that must be downloaded."""
    model = model_zoo.get_config(model_config).model
    for field, value in read_backbone(name, "backbone", *IMAGE_FIELDS).items():
        model[field] = value
    return model


def count_backbones(height: int, width: int) -> Iterator[BackboneCosts]:
    for name in tqdm(backbone_names()):
        costs = (
            count_cost(instantiate(swap_backbone(config, name)), height, width)
            for config in (FULL, LITE)
        )
        yield BackboneCosts(name, *costs)


def backbone_table(counted: Iterable[BackboneCosts]) -> str:
    lines = [
        "| library | backbone | backbone, GFLOPs "
        "| full: GFLOPs | params (M) | lite: GFLOPs | params (M) |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, full, lite in counted:
        cells = [
            backbone_library(name),
            f"[`{name}`](../configs/{model_zoo.BACKBONES}/{name}.py)",
            f"{full.flops['backbone'] / 1e9:.1f}",
        ]
        for cost in (full, lite):
            cells += [f"{cost.flops['total'] / 1e9:.1f}", f"{cost.parameters / 1e6:.2f}"]
        lines.append(markdown_row(cells))
    return "\n".join(lines)


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("configs", nargs="*", default=[], help="files or model zoo names")
    which.add_argument("--all", action="store_true", help="every config of the tables")
    which.add_argument(
        "--backbones",
        action="store_true",
        help=f"all of configs/{model_zoo.BACKBONES}, with the full and with the lite encoder",
    )
    parser.add_argument("--size", type=cli.size, default=(800, 1066), help="HEIGHTxWIDTH")
    parser.add_argument("--markdown", type=page, help="rewrite the tables of this page")
    args = parser.parse_args(argv)
    zoo = [name for name in model_zoo.list_configs() if is_row(name)]
    names = zoo if args.all else args.configs
    if not (names or args.backbones):
        parser.error("name configs, or give --all or --backbones")
    if args.backbones:
        tables = printed = backbone_table(count_backbones(*args.size))
    else:
        rows = tqdm(names, disable=len(names) < 2)
        costs = {name: analyze(name, *args.size) for name in rows}
        tables = markdown_tables(costs, "{}x{}".format(*args.size))
        printed = text_table(costs)
    print(printed)
    if args.markdown:
        write_tables(args.markdown, tables)


if __name__ == "__main__":
    main()
