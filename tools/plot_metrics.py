#!/usr/bin/env python
"""Draw the losses and the average precision of a training run from its metrics.json."""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The last decoder layer's losses; those of the other layers follow the same course.
LOSSES = {"total_loss": "all", "loss_ce": "class", "loss_bbox": "box L1", "loss_giou": "box GIoU"}
PRECISIONS = {"bbox/AP": "AP", "bbox/AP50": "AP50", "bbox/AP75": "AP75"}


def read_series(metrics_file: Path, keys: list[str]) -> dict[str, list[tuple[int, float]]]:
    """``{key: [(iteration, value), ...]}`` for the keys that the file has."""
    records = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    series = {
        key: [(record["iteration"], record[key]) for record in records if key in record]
        for key in keys
    }
    return {key: points for key, points in series.items() if points}


def plot(metrics_file: Path, output: Path) -> None:
    panels = [("loss", LOSSES, True), ("average precision on the test set, %", PRECISIONS, False)]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, (label, names, logarithmic) in zip(axes, panels):
        for key, points in read_series(metrics_file, list(names)).items():
            marker = "" if logarithmic else "o"
            axis.plot(*zip(*points), marker=marker, label=names[key])
        axis.set(xlabel="iteration", ylabel=label)
        if logarithmic:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3, which="both")
        if axis.lines:
            axis.legend()
    figure.savefig(output, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("metrics", type=Path, help="metrics.json in a run's output_dir")
    parser.add_argument("--output", type=Path, help="picture to write; default: beside the file")
    args = parser.parse_args()
    if not args.metrics.is_file():
        sys.exit(f"error: {args.metrics} is not a file; Detectron2 writes it to train.output_dir")
    output = args.output or args.metrics.with_name("training.png")
    plot(args.metrics, output)
    print(f"losses and average precision of {args.metrics}: {output}")


if __name__ == "__main__":
    main()
