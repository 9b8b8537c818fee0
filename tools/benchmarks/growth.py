#!/usr/bin/env python
"""Draw how the time and memory of full and lite encoders grow with the image and the batch.

growth.py --output docs/images/growth.png --json docs/images/growth.json --threads 2
growth.py --long-sides 256 512 1024 --batch 1 4 --task training

The encoders are those of configs of the model zoo, with random weights, alone on random tokens: as
many as images of 4:3 have at strides 8, 16, 32 and 64. They take turns at each size and batch.
Times are medians. Memory is the peak of one call above what was in use before it, as
operators.py measures it; in training with the backward pass.

The exponents a and b are those of ``c * side^a * batch^b``, fitted by least squares to the
logarithms of all points of an encoder; these include small images, for which the fixed cost of a
call matters. Tokens grow with the square of the side: a cost that is linear in the tokens has a =
2.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from calls import check_device, environment, peak_memory, time_turn
from detectron2.config import instantiate
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from lite_detr import cli, model_zoo
from lite_detr.modeling.scales import Scales

CONFIGS = (
    "dino/dino_r50_4scale_36ep.py",
    "dino/lite_dino_r50_h3l1_2p1x3_36ep.py",
    "dino/lite_dino_r50_h3l1_6p1x1_36ep.py",
    "dino/lite_dino_r50_h2l2_2p1x3_36ep.py",
)
LONG_SIDES = (256, 384, 512, 768, 1024, 1280, 1600)
STRIDES = (8, 16, 32, 64)
MEASURES = {"seconds": "time, s", "memory": "memory, MiB"}


@dataclass(frozen=True)
class Point:
    """The cost of one encoder at one size and batch.

    Attributes:
        encoder: its config.
        long_side: of the image, in pixels.
        batch: images at a time.
        tokens: of an image.
        seconds: the median of the rounds.
        memory: MiB; None if unknown.
    """

    encoder: str
    long_side: int
    batch: int
    tokens: int
    seconds: float
    memory: float | None


def make_call(
    encoder: nn.Module, width: int, long_side: int, batch: int, training: bool, device: str
) -> tuple[Callable[[], None], int]:
    """One pass over random tokens of ``width`` channels, and how many tokens an image has."""
    height = long_side * 3 // 4
    shapes = [(-(-height // stride), -(-long_side // stride)) for stride in STRIDES]
    masks = [torch.zeros(batch, *shape, dtype=torch.bool, device=device) for shape in shapes]
    scales = Scales.from_masks(masks, padded=False, dtype=torch.float32)
    tokens, pos = torch.randn(2, batch, scales.num_tokens, width, device=device)
    tokens.requires_grad_(training)

    def call() -> Tensor:
        with torch.set_grad_enabled(training):
            memory = encoder(tokens, pos, scales)
            if training:
                memory.backward(torch.ones_like(memory))
                tokens.grad = None
                encoder.zero_grad()
        return memory.detach()

    return call, scales.num_tokens


def measure(args: argparse.Namespace) -> Iterator[Point]:
    training = args.task == "training"
    models = {name: model_zoo.get_config(name).model for name in args.config_file}
    encoders = {
        name: instantiate(model.encoder).to(args.device).train(training)
        for name, model in models.items()
    }
    for long_side, batch in tqdm(list(itertools.product(args.long_sides, args.batch))):
        calls = {}
        for name, encoder in encoders.items():
            width = models[name].embed_dim
            calls[name], tokens = make_call(encoder, width, long_side, batch, training, args.device)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for index in range(1 + args.rounds):
            for name, call in calls.items():
                seconds = time_turn(call, args.device)
                times[name] += seconds if index else []  # The first round warms up.
        for name, call in calls.items():
            size = peak_memory(call, args.device)
            yield Point(
                encoder=name,
                long_side=long_side,
                batch=batch,
                tokens=tokens,
                seconds=statistics.median(times[name]),
                memory=None if size is None else size / 2**20,
            )


def fit(points: Sequence[Point], measure: str) -> dict[str, float | None]:
    """Return the exponents by which a measure grows with ``long_side`` and ``batch``.

    An exponent is None without two values of its variable, or if a measure is unknown or zero.
    """
    values = [getattr(point, measure) for point in points]
    names = [
        name
        for name in ("long_side", "batch")
        if len({getattr(point, name) for point in points}) > 1
    ]
    exponents: dict[str, float | None] = {"long_side": None, "batch": None}
    if names and all(values):
        logarithms = [np.log([getattr(point, name) for point in points]) for name in names]
        design = np.stack([*logarithms, np.ones(len(points))], axis=1)
        solution, *_ = np.linalg.lstsq(design, np.log(values))
        exponents |= dict(zip(names, solution.tolist()))
    return exponents


def fits(points: Sequence[Point]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return the exponents by encoder and measure."""
    return {
        name: {measure: fit(of_encoder(points, name), measure) for measure in MEASURES}
        for name in dict.fromkeys(point.encoder for point in points)
    }


def of_encoder(points: Sequence[Point], name: str) -> list[Point]:
    return [point for point in points if point.encoder == name]


def draw(points: Sequence[Point], output: Path) -> None:
    """Draw time and memory, by the long side at the smallest batch and by batch at the largest."""
    exponents = fits(points)
    axes_of = {"long_side": "long side of the image, px", "batch": "images in a batch"}
    fixed = {
        "long_side": ("batch", min(point.batch for point in points)),
        "batch": ("long_side", max(point.long_side for point in points)),
    }
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for (row, measure), (column, variable) in itertools.product(
        enumerate(MEASURES), enumerate(axes_of)
    ):
        axis = axes[row, column]
        other, value = fixed[variable]
        for name, found in exponents.items():
            line = [p for p in of_encoder(points, name) if getattr(p, other) == value]
            line = [p for p in line if getattr(p, measure)]
            exponent = found[measure][variable]
            grows = "" if exponent is None else f": exponent {exponent:.2f}"
            axis.plot(
                [getattr(point, variable) for point in line],
                [getattr(point, measure) for point in line],
                marker="o",
                label=f"{Path(name).stem}{grows}",
            )
        ticks = sorted({getattr(point, variable) for point in points})
        axis.set(
            xscale="log", yscale="log", xlabel=axes_of[variable], ylabel=MEASURES[measure],
            title=f"{other.replace('_', ' ')} {value}",
        )  # fmt: skip
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(output, dpi=120)


def table(points: Sequence[Point]) -> str:
    """Return the exponents as a markdown table."""
    lines = [
        "| encoder of | time by side | time by batch | memory by side | memory by batch |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, found in fits(points).items():
        cells = [
            "–" if exponent is None else f"{exponent:.2f}"
            for exponents in found.values()
            for exponent in exponents.values()
        ]
        lines.append(f"| {' | '.join([Path(name).stem, *cells])} |")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    many, positive = dict(nargs="+"), cli.whole_number(1)
    sides = cli.whole_number(STRIDES[-1])
    add = parser.add_argument
    add("--config-file", **many, default=CONFIGS, metavar="C", help="whose encoders; of 4 scales")
    add("--long-sides", **many, type=sides, default=LONG_SIDES, metavar="PX", help="of the images")
    add("--batch", **many, type=positive, default=[1, 2, 4], help="images at a time")
    add("--task", choices=("inference", "training"), default="inference")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=positive, default=torch.get_num_threads(), help="of the CPU")
    add("--rounds", type=positive, default=5)
    add("--output", type=Path, default=Path("growth.png"), help="picture to write")
    add("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args(argv)


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    check_device(args.device)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    points = list(measure(args))
    where = environment(args.device) | {"threads": args.threads}
    print(", ".join(f"{name} {value}" for name, value in where.items() if value is not None))
    print(table(points))
    draw(points, args.output)
    print(f"how time and memory grow: {args.output}")
    if args.json:
        figures = {
            "environment": where,
            "task": args.task,
            "points": [dataclasses.asdict(point) for point in points],
            "exponents": fits(points),
        }
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
