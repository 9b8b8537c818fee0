#!/usr/bin/env python
"""Draw which tokens an encoder updates, for five ways to spend less on them.

encoder_cost.py --output docs/images/encoder_cost.png

A sketch: the maps of an image with two objects, on a grid of few cells. A cell's colour is the
number of layers, of six, that update its token.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from lite_detr import cli

LAYERS = 6
# Height and width in cells of the maps, from fine to coarse, and their names.
MAPS = {"S3": (8, 12), "S4": (4, 6), "S5": (2, 3), "S6": (1, 2)}
# Left, top, width and height of the objects, as shares of the image.
OBJECTS = ((0.12, 0.2, 0.3, 0.6), (0.66, 0.45, 0.22, 0.4))
# Of 0 to 6 updates.
COLORS = ListedColormap(["white", "#d6e6f4", "#abd0e6", "#6aaed6", "#3787c0", "#105ba4", "#08306b"])
WIDTH, HEIGHT, GAP = 12.0, 8.0, 1.6


def scores(shape: tuple[int, int]) -> np.ndarray:
    """Return how close each cell ``[H, W]`` of a map is to an object; 1 at the centre of one."""
    rows, columns = (np.arange(size) + 0.5 for size in shape)
    best = np.zeros(shape)
    for left, top, width, height in OBJECTS:
        x = (columns / shape[1] - left - width / 2) / width
        y = (rows / shape[0] - top - height / 2) / height
        best = np.maximum(best, np.exp(-2 * (x[None] ** 2 + y[:, None] ** 2)))
    return best


def keep_best(values: np.ndarray, threshold: float) -> np.ndarray:
    """Return updates ``[H, W]``: of the cells above the threshold in all layers, else none."""
    return np.where(values > threshold, LAYERS, 0)


def draw_map(axis: Axes, updates: np.ndarray, top: float) -> None:
    """Draw a map as wide as all others, with the objects on it."""
    rows, columns = updates.shape
    width, height = WIDTH / columns, HEIGHT / rows
    for row, column in np.ndindex(updates.shape):
        axis.add_patch(
            Rectangle(
                (column * width, top + row * height), width, height,
                facecolor=COLORS(int(updates[row, column])), edgecolor="0.6", linewidth=0.5,
            )
        )  # fmt: skip
    for left, upper, wide, high in OBJECTS:
        corner = (left * WIDTH, top + upper * HEIGHT)
        axis.add_patch(
            Rectangle(
                corner, wide * WIDTH, high * HEIGHT, fill=False, edgecolor="C1", linewidth=1.5
            )
        )


def draw_maps(axis: Axes, maps: dict[str, np.ndarray]) -> None:
    for index, (name, updates) in enumerate(maps.items()):
        top = index * (HEIGHT + GAP)
        draw_map(axis, updates, top)
        axis.text(-0.4, top + HEIGHT / 2, name, ha="right", va="center", fontsize=8)


def draw_none(axis: Axes) -> None:
    draw_maps(axis, {name: np.full(shape, LAYERS) for name, shape in MAPS.items()})


def draw_interleaving(axis: Axes) -> None:
    """H3L1-(2+1)x3: three of six layers update S3."""
    maps = {name: np.full(shape, LAYERS) for name, shape in MAPS.items()}
    draw_maps(axis, maps | {"S3": np.full(MAPS["S3"], LAYERS // 2)})


def draw_sparsification(axis: Axes) -> None:
    draw_maps(axis, {name: keep_best(scores(shape), 0.45) for name, shape in MAPS.items()})


def draw_pooling(axis: Axes) -> None:
    """One map, whose other tokens become averages below it."""
    draw_maps(axis, {"C5": keep_best(scores((8, 12)), 0.45)})
    for column in range(6):
        center = (WIDTH / 12 + column * WIDTH / 6, HEIGHT + GAP + 1)
        axis.add_patch(Circle(center, 0.7, facecolor=COLORS(LAYERS), edgecolor="0.6"))
    note = "averages of the white cells"
    axis.text(WIDTH / 2, HEIGHT + 2 * GAP + 1.6, note, ha="center", fontsize=8)


def draw_sampling(axis: Axes) -> None:
    """The coarsest map, and points on all maps around objects, for one layer each."""
    maps = {f"C{stage}": np.zeros(shape) for stage, shape in zip((2, 3, 4), MAPS.values())}
    draw_maps(axis, maps | {"C5": np.full((1, 2), LAYERS)})
    random = np.random.default_rng(0)
    for level in range(4):
        for left, top, width, height in OBJECTS:
            places = random.uniform(-0.1, 1.1, (8, 2)) * (width, height) + (left, top)
            x, y = (places.clip(0.02, 0.98) * (WIDTH, HEIGHT)).T
            axis.scatter(x, y + level * (HEIGHT + GAP), s=9, color=COLORS(1), edgecolor="k", lw=0.5)


PANELS = {
    "none\nDeformable DETR, DINO": draw_none,
    "interleaving\nLite DETR, H3L1-(2+1)x3": draw_interleaving,
    "token sparsification\nSparse DETR": draw_sparsification,
    "pooling\nPnP-DETR": draw_pooling,
    "sampling\nIMFA": draw_sampling,
}


def draw() -> Figure:
    """Return the figure, a panel for each way."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for axis, (title, draw_panel) in zip(axes, PANELS.items()):
        draw_panel(axis)
        axis.set_title(title, fontsize=10)
        axis.set(xlim=(-2, WIDTH + 0.2), ylim=(4 * (HEIGHT + GAP), -0.3), aspect="equal")
        axis.axis("off")
    scale = ScalarMappable(Normalize(-0.5, LAYERS + 0.5), COLORS)
    bar = figure.colorbar(scale, ax=axes, location="bottom", shrink=0.4, aspect=40)
    bar.set_ticks(range(LAYERS + 1))
    bar.set_label("layers, of six, that update a token; orange: objects", fontsize=9)
    return figure


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    parser: argparse.ArgumentParser = cli.make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("encoder_cost.png"), help="to write")
    args = parser.parse_args(argv)
    draw().savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
