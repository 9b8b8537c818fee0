#!/usr/bin/env python
"""Count the multiply-adds, parameters and tokens of the model zoo's detectors.

analyze_model.py dino/lite_dino_r50_h3l1_2p1x3_36ep.py   # one or several configs
analyze_model.py --all --markdown docs/MODEL_ZOO.md      # rewrites the tables there
analyze_model.py --backbones --markdown docs/backbones.md   # the same two models, other backbones
"""

import argparse
import json
import sys
from pathlib import Path

from backbone_table import backbone_rows, backbone_table
from detectron2.config import instantiate
from tqdm import tqdm

from lite_detr import cli, model_zoo
from lite_detr.analysis.flops import PARTS, ModelCost, count_cost
from lite_detr.analysis.markdown_page import page, write_tables

REPORTED = Path(__file__).with_name("reported.json")
FAMILIES = {"deformable_detr": "Deformable DETR", "dino": "DINO", "h_detr": "H-DETR"}


def analyze(name: str, height: int, width: int) -> ModelCost:
    """The cost of one config; the classes are COCO's, unless the config has others."""
    return count_cost(instantiate(model_zoo.get_config(name).model), height, width)


def row(cost: ModelCost) -> list[str]:
    flops = [cost.flops[part] / 1e9 for part in ("total", *PARTS)]
    return [f"{value:.1f}" for value in flops] + [f"{cost.parameters / 1e6:.2f}"]


def text_table(costs: dict[str, ModelCost]) -> str:
    header = ["config", "GFLOPs", *PARTS, "params (M)", "tokens of each scale"]
    rows = [header]
    for name, cost in costs.items():
        share = ", ".join(f"{n} ({n / sum(cost.tokens):.1%})" for n in cost.tokens)
        rows.append([name, *row(cost), share])
    widths = [max(len(line[column]) for line in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in rows
    )


def markdown_tables(costs: dict[str, ModelCost], size: str) -> str:
    """A table for each family: our counts beside what the paper reports."""
    reported = {entry["config"]: entry for entry in json.loads(REPORTED.read_text())["rows"]}
    parts = []
    for folder, title in FAMILIES.items():
        parts += [
            f"### {title}",
            "",
            f"| config in `{folder}/` | GFLOPs | backbone | encoder | decoder | params (M) "
            "| reported GFLOPs | reported encoder | reported params (M) | reported AP |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for name, cost in costs.items():
            if not name.startswith(f"{folder}/"):
                continue
            entry = reported.get(name, {})
            figures = [entry.get(key) for key in ("GFLOPs", "encoder_GFLOPs", "params_M", "AP")]
            theirs = ["–" if figure is None else str(figure) for figure in figures]
            cells = [f"`{name.split('/')[1]}`", *row(cost), *theirs]
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    for tokens in sorted({cost.tokens for cost in costs.values()}, reverse=True):
        shares = ", ".join(f"{count} ({count / sum(tokens):.1%})" for count in tokens)
        parts.append(f"At {size}, {len(tokens)} scales have {shares} tokens.")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("configs", nargs="*", default=[], help="files or names of the model zoo")
    which.add_argument("--all", action="store_true", help="every R50 and Swin-T config of the zoo")
    which.add_argument(
        "--backbones",
        action="store_true",
        help=f"all of configs/{model_zoo.BACKBONES}, with the full and with the lite encoder",
    )
    parser.add_argument("--size", type=cli.size, default=(800, 1066), help="HEIGHTxWIDTH")
    parser.add_argument("--markdown", type=page, help="rewrite the tables of this page")
    args = parser.parse_args()
    zoo = [name for name in model_zoo.list_configs() if name.split("/")[0] in FAMILIES]
    names = zoo if args.all else args.configs
    if not (names or args.backbones):
        parser.error("name configs, or give --all or --backbones")
    try:
        if args.backbones:
            tables = printed = backbone_table(backbone_rows(*args.size))
        else:
            rows = tqdm(names, disable=len(names) < 2)
            costs = {name: analyze(name, *args.size) for name in rows}
            tables = markdown_tables(costs, "{}x{}".format(*args.size))
            printed = text_table(costs)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(printed)
    if args.markdown:
        write_tables(args.markdown, tables)


if __name__ == "__main__":
    main()
