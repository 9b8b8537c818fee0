#!/usr/bin/env python
"""Draw reported AP against measured time and counted multiply-adds, for the paper's ResNet-50 rows.

detectors.py --config-file $(table_rows.py --list) --json rows.json
table_rows.py rows.json --chart docs/images/rows.png

The first command measures all rows in turns; --list prints the configs that reported.json names.
The second prints a table and draws the chart from what it wrote.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import detectors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from records import digits
from tqdm import tqdm

from lite_detr import cli
from lite_detr.errors import LiteDetrError

REPORTED = Path(__file__).parents[1] / "reported.json"
BACKBONE = "R50"
# Words in the names of models, and the series that they belong to.
SERIES = ("Deformable DETR", "H-DETR", "DINO", "Sparse DETR")
OTHERS = "one scale, dense attention"


@dataclass(frozen=True)
class Row:
    """A row of the paper's tables, and what was measured of it.

    Attributes:
        model: its name in the paper.
        ap: reported.
        gflops: counted, of one image.
        times: milliseconds of an image: the median, and the first and last decile.
        backbone, encoder: milliseconds of these parts.
        memory: MiB: the peak of an inference, and of its encoder alone; None if unknown.
    """

    model: str
    ap: float
    gflops: float
    times: tuple[float, float, float]
    backbone: float
    encoder: float
    memory: tuple[float, float] | None

    @property
    def series(self) -> str:
        return next((name for name in SERIES if name in self.model), OTHERS)

    @property
    def label(self) -> str:
        """The name without the series that it is drawn in."""
        return self.model.removeprefix("Lite-").removeprefix(self.series).lstrip(" -")


def reported_rows() -> dict[str, dict]:
    """Return the rows of the paper's tables with this backbone by their configs."""
    rows = json.loads(REPORTED.read_text())["rows"]
    return {row["config"]: row for row in rows if "config" in row and row["backbone"] == BACKBONE}


def read_rows(path: Path) -> list[Row]:
    """Read what ``detectors.py --json`` wrote, and count the multiply-adds.

    Raises:
        LiteDetrError: it measured none of the rows, or one of them twice.
    """
    reported = reported_rows()
    records = [
        record
        for record in json.loads(path.read_text())["records"]
        if record["case"]["subject"] in reported
    ]
    subjects = [record["case"]["subject"] for record in records]
    if not subjects or len(subjects) > len(set(subjects)):
        raise LiteDetrError(
            f"{path} must have one record of each config; make it by detectors.py "
            "--config-file $(table_rows.py --list) --json"
        )
    rows = []
    for record in tqdm(records, unit="row"):
        case, milliseconds = record["case"], record["milliseconds"]
        latency, memory = milliseconds["latency"], record["memory_bytes"]
        entry = reported[case["subject"]]
        flops = detectors.multiply_adds(case["subject"], (), tuple(case["size"]))
        rows.append(
            Row(
                model=entry["model"],
                ap=entry["AP"],
                gflops=flops / 1e9,
                times=tuple(latency[key] for key in ("median", "p10", "p90")),
                backbone=milliseconds["backbone"]["median"],
                encoder=milliseconds["encoder"]["median"],
                memory=memory and (memory["peak"] / 2**20, memory["encoder"] / 2**20),
            )
        )
    return sorted(rows, key=lambda row: row.ap)


def table(rows: Sequence[Row]) -> str:
    """Return a markdown table, in the order of AP."""
    lines = [
        "| model | reported AP | GFLOPs | ms | p10 | p90 | backbone, ms | encoder, ms "
        "| MiB | encoder, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        memory = map(digits, row.memory) if row.memory else ("–", "–")
        times = map(digits, (*row.times, row.backbone, row.encoder))
        cells = [str(row.ap), f"{row.gflops:.1f}", *times]
        lines.append(f"| {' | '.join([row.model, *cells, *memory])} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], output: Path) -> None:
    """Draw AP against time and against multiply-adds; a line joins the variants of a detector."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    draw_points(left, rows, [row.times[0] / 1e3 for row in rows])
    draw_points(right, rows, [row.gflops for row in rows])
    left.set(xlabel="measured time of an image on a CPU, s", ylabel="reported AP on COCO val2017")
    right.set(xlabel="multiply-adds of an image, G")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(output, dpi=120)


def draw_points(axis: Axes, rows: Sequence[Row], values: Sequence[float]) -> None:
    for index, series in enumerate((*SERIES, OTHERS)):
        # In the order of AP, which the rows are in.
        points = [(value, row) for value, row in zip(values, rows) if row.series == series]
        if not points:
            continue
        style, color = ("none", "0.4") if series == OTHERS else ("-", f"C{index}")
        xs, members = zip(*points)
        aps = [row.ap for row in members]
        axis.plot(
            xs, aps, linestyle=style, marker="o", color=color, linewidth=1, alpha=0.7, label=series
        )
        # To the left where Deformable DETR's variants have their labels to the right.
        offset, side = ((-6, -3), "right") if series == "Sparse DETR" else ((6, -3), "left")
        for x, row in points:
            label = "full" if row.model == series else row.label
            axis.annotate(
                label, (x, row.ap), offset, textcoords="offset points", ha=side, fontsize=7,
                color=color,
            )  # fmt: skip
    axis.margins(x=0.15)
    axis.grid(alpha=0.3)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="print the configs of the rows")
    what.add_argument("json", nargs="?", type=Path, help="what detectors.py wrote")
    parser.add_argument("--chart", type=Path, help="picture to write")
    return parser.parse_args(argv)


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.list:
        print(*reported_rows())
        return
    rows = read_rows(args.json)
    print(table(rows))
    if args.chart:
        draw(rows, args.chart)
        print(f"AP against time and multiply-adds: {args.chart}", file=sys.stderr)


if __name__ == "__main__":
    main()
