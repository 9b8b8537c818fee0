"""Draws the multi-scale tokens of an image and what encoders do with them."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from feature_scales import COLOURS, scale_name
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PANEL_WIDTH = 3.4  # inches
CHART_HEIGHT = 2.9  # inches
FADING = 0.35  # of the image towards white, for grids to stand out


@dataclass(frozen=True)
class TokenGrid:
    """The tokens of one scale.

    Attributes:
        stride: pixels of the resized image that a cell is wide.
        shape: ``(height, width)`` in cells, those of the backbone's padding too.
        cell: ``(height, width)`` of a cell in pixels of the image as it is drawn.
    """

    stride: int
    shape: tuple[int, int]
    cell: tuple[float, float]

    @property
    def tokens(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class EncoderUpdates:
    """How often an encoder updates the tokens of each scale.

    Attributes:
        name: what the figure calls the encoder.
        counts: of each scale, finest first.
    """

    name: str
    counts: tuple[int, ...]

    def share(self, tokens: Sequence[int]) -> float:
        """Its updates of single tokens, as a share of those of all tokens in each layer."""
        updates = sum(count * number for count, number in zip(self.counts, tokens))
        return updates / (max(self.counts) * sum(tokens))


def draw_tokens(
    image: np.ndarray, grids: Sequence[TokenGrid], encoders: Sequence[EncoderUpdates]
) -> Figure:
    """Above a panel for each scale, below the shares of the scales and a chart for each encoder.

    Args:
        image: RGB, ``[H, W, 3]`` uint8.
        grids: of the scales, finest first.
        encoders: that update these scales.
    """
    height = PANEL_WIDTH * image.shape[0] / image.shape[1] + 0.75
    figure = plt.figure(
        figsize=(len(grids) * PANEL_WIDTH, height + CHART_HEIGHT), layout="constrained"
    )
    above, below = figure.subfigures(2, height_ratios=(height, CHART_HEIGHT))
    for axis, grid, colour in zip(above.subplots(1, len(grids), squeeze=False)[0], grids, COLOURS):
        draw_grid(axis, image, grid, colour)
    shares, *charts = below.subplots(1, 1 + len(encoders), width_ratios=[1.3] + [1] * len(encoders))
    draw_shares(shares, grids)
    highest = max(max(encoder.counts) for encoder in encoders)
    for axis, encoder in zip(charts, encoders):
        draw_updates(axis, grids, encoder, highest)
    charts[0].set_ylabel("updates of each token")
    return figure


def draw_grid(axis: Axes, image: np.ndarray, grid: TokenGrid, colour: str) -> None:
    faded = (255 - (255 - image.astype(float)) * (1 - FADING)).astype(np.uint8)
    axis.imshow(faded)
    height, width = image.shape[:2]
    style = {"color": colour, "linewidth": 0.25 + 0.012 * grid.stride}
    axis.vlines(np.arange(0, width, grid.cell[1]), 0, height, **style)
    axis.hlines(np.arange(0, height, grid.cell[0]), 0, width, **style)
    axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    rows, columns = grid.shape
    axis.set_title(
        f"{scale_name(grid.stride)}, stride {grid.stride}\n"
        f"{rows} × {columns} = {grid.tokens:,} tokens",
        fontsize=12,
    )


def draw_shares(axis: Axes, grids: Sequence[TokenGrid]) -> None:
    total = sum(grid.tokens for grid in grids)
    shares = [100 * grid.tokens / total for grid in grids]
    names = [scale_name(grid.stride) for grid in grids]
    bars = axis.barh(names, shares, color=COLOURS[: len(grids)])
    axis.bar_label(bars, [f"{share:.1f} %" for share in shares], padding=4, fontsize=11)
    axis.invert_yaxis()
    axis.set(xlim=(0, 120), xticks=[])
    axis.set_title(f"share of the\n{total:,} tokens", fontsize=12)
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def draw_updates(
    axis: Axes, grids: Sequence[TokenGrid], encoder: EncoderUpdates, highest: int
) -> None:
    """A bar for each scale, as wide as its share of the tokens, so that areas are work."""
    tokens = np.array([grid.tokens for grid in grids])
    widths = 100 * tokens / tokens.sum()
    starts = np.cumsum(widths) - widths
    axis.bar(starts, encoder.counts, widths, align="edge", color=COLOURS[: len(grids)])
    axis.set(xlim=(0, 100), ylim=(0, highest), xticks=[0, 50, 100], xlabel="% of the tokens")
    axis.set_yticks(range(highest + 1))
    axis.set_title(
        f"{encoder.name}\n{100 * encoder.share(tokens.tolist()):.0f} % of the updates",
        fontsize=12,
    )
    axis.spines[["top", "right"]].set_visible(False)
