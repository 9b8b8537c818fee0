"""Draw where attention looks, and the multi-scale tokens of an image with what encoders do to them.

Needs Matplotlib. Figures are made without pyplot, so they leave its state and backend alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..errors import UnknownPartError
from ..inference.pictures import class_colour
from ..labels import label as one_line
from ..modeling.detector import Detector
from .attention_maps import Samples

# From the finest scale on: markers of samples, and colours that also differ in brightness.
MARKERS = ("o", "s", "^", "D", "P", "X")
COLOURS = ("#3b4cc0", "#1a9e96", "#e3a011", "#c4342b", "#7b3294", "#555555")
SAMPLE_PANEL_WIDTH = 4.4  # inches
GRID_PANEL_WIDTH = 3.4  # inches
CHART_HEIGHT = 2.9  # inches
# How far images are faded towards white, so that points and grids stand out.
SAMPLE_FADING = 0.4
GRID_FADING = 0.35
COLOUR_MAP = "plasma"
MARKER_AREA = 30  # square points
QUERY = {"marker": "*", "color": "#00e5ff", "markeredgecolor": "black", "linestyle": ""}
MAX_NAME = 60  # characters


@dataclass(frozen=True)
class Panel:
    """Samples that share a picture.

    Attributes:
        title: above the picture.
        samples: their places and weights.
        query: ``(x, y)`` of the samples' query in the image's ``[0, 1]`` frame; None if they are of
            several.
    """

    title: str
    samples: Samples
    query: tuple[float, float] | None = None


@dataclass(frozen=True)
class ModelRow:
    """A row of the figure: one model on the image.

    Attributes:
        title: names the model and the attention.
        instances: the model's detections, drawn as boxes.
        strides: of the model's scales, finest first.
        panels: from left to right.
    """

    title: str
    instances: Instances
    strides: list[int]
    panels: list[Panel]


@dataclass(frozen=True)
class TokenGrid:
    """The tokens of one scale.

    Attributes:
        stride: width of a cell in pixels of the resized image.
        shape: ``(height, width)`` in cells, those of the backbone's padding included.
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
    """The number of times that an encoder updates the tokens of each scale.

    Attributes:
        name: the encoder's name in the figure.
        counts: for each scale, finest first.
    """

    name: str
    counts: tuple[int, ...]

    def share(self, tokens: Sequence[int]) -> float:
        """Return the updates of single tokens as a share of updating all in every layer."""
        updates = sum(count * number for count, number in zip(self.counts, tokens))
        return updates / (max(self.counts) * sum(tokens))


def scale_strides(model: Detector) -> list[int]:
    """Return the width of a cell of each scale in pixels, finest first."""
    shapes = model.backbone.output_shape()
    strides = [shapes[name].stride for name in model.neck.in_features]
    for _ in model.neck.extra_convs:
        strides.append(2 * strides[-1])
    return strides


def scale_name(stride: int) -> str:
    """Return the papers' name of a scale: ``S3`` for stride 8; each scale halves the one before."""
    return f"S{stride.bit_length() - 1}"


def find_scale(strides: list[int], stride: int) -> int:
    """Return the index of the scale of a stride.

    Raises:
        UnknownPartError: there is none.
    """
    if stride not in strides:
        raise UnknownPartError(
            f"the model has no scale of stride {stride}; it has {', '.join(map(str, strides))}: "
            "give two of them with --strides"
        )
    return strides.index(stride)


def draw_attention(
    image: np.ndarray, rows: Sequence[ModelRow], metadata: Metadata | None
) -> Figure:
    """Draw a row of panels for each model, with a colour bar under each panel.

    Args:
        image: RGB, ``[H, W, 3]`` uint8.
        rows: all with the same number of panels.
        metadata: names the classes; None writes their numbers.
    """
    columns = len(rows[0].panels)
    height = SAMPLE_PANEL_WIDTH * image.shape[0] / image.shape[1] + 1.5
    size = (columns * SAMPLE_PANEL_WIDTH, len(rows) * height)
    figure = Figure(figsize=size, layout="constrained")
    for row, part in zip(rows, np.atleast_1d(figure.subfigures(len(rows)))):
        draw_row(part, image, row, metadata)
    return figure


def draw_row(part: SubFigure, image: np.ndarray, row: ModelRow, metadata: Metadata | None) -> None:
    part.suptitle(one_line(row.title, MAX_NAME), fontsize=13, fontweight="bold", parse_math=False)
    for axis, panel in zip(part.subplots(1, len(row.panels), squeeze=False)[0], row.panels):
        axis.imshow(fade(image, SAMPLE_FADING))
        axis.set_title(panel.title, fontsize=11)
        axis.set(xticks=[], yticks=[], xlim=(0, image.shape[1]), ylim=(image.shape[0], 0))
        draw_boxes(axis, row.instances)
        add_colour_bar(axis, draw_samples(axis, panel, image.shape[:2]))
    handles = scale_handles(row) + class_handles(row.instances, metadata)
    if any(panel.query is not None for panel in row.panels):
        handles.append(Line2D([], [], markersize=13, label="query", **QUERY))
    add_legend(part, handles)


def fade(image: np.ndarray, share: float) -> np.ndarray:
    return (255 - (255 - image.astype(float)) * (1 - share)).astype(np.uint8)


def add_legend(part: SubFigure, handles: list[Line2D]) -> None:
    """Put a legend below the panels, in as few lines as the width allows."""
    for columns in range(len(handles), 0, -1):
        legend = part.legend(
            handles=handles, loc="outside lower center", ncols=columns, fontsize=11
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        if columns == 1 or legend.get_window_extent().width <= part.bbox.width:
            return
        legend.remove()


def draw_boxes(axis: Axes, instances: Instances) -> None:
    for (x0, y0, x1, y1), label in zip(
        instances.pred_boxes.tensor.tolist(), instances.pred_classes.tolist()
    ):
        xs, ys = [x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0]
        axis.plot(xs, ys, linewidth=1.2, color=class_colour(label))


def draw_samples(axis: Axes, panel: Panel, size: tuple[int, int]) -> ScalarMappable:
    """Draw a panel's samples and its query, and return the colours of the weights.

    Args:
        axis: in pixels of the image.
        panel: what to draw; its title is not drawn.
        size: height and width of the image in pixels.
    """
    height, width = size
    points, weights, levels = (tensor.cpu().float().numpy() for tensor in panel.samples)
    # If no sample is inside the image, the colour bar shows all possible weights.
    limits = (weights.min(), weights.max()) if len(weights) else (0, 1)
    scale = ScalarMappable(Normalize(*limits), COLOUR_MAP)
    # The finest scale, and the heaviest samples of each scale, are drawn last and so on top.
    for level in np.unique(levels)[::-1].astype(int):
        of_level = np.flatnonzero(levels == level)[::-1]
        axis.scatter(
            points[of_level, 0] * width,
            points[of_level, 1] * height,
            s=MARKER_AREA,
            marker=MARKERS[level],
            c=scale.to_rgba(weights[of_level]),
            edgecolors="black",
            linewidths=0.4,
            zorder=3,
        )
    if panel.query is not None:
        x, y = panel.query
        axis.plot(x * width, y * height, markersize=20, zorder=2.5, **QUERY)
    return scale


def add_colour_bar(axis: Axes, scale: ScalarMappable) -> None:
    bar = axis.figure.colorbar(scale, ax=axis, location="bottom", shrink=0.8, aspect=30, pad=0.02)
    bar.set_label("attention weight", fontsize=10)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()


def scale_handles(row: ModelRow) -> list[Line2D]:
    return [
        Line2D(
            [],
            [],
            marker=marker,
            color="white",
            markeredgecolor="black",
            linestyle="",
            markersize=8,
            label=f"{scale_name(stride)} (stride {stride})",
        )
        for marker, stride in zip(MARKERS, row.strides)
    ]


def class_handles(instances: Instances, metadata: Metadata | None) -> list[Line2D]:
    names = metadata.thing_classes if metadata is not None else None
    labels = sorted(set(instances.pred_classes.tolist()))
    return [
        Line2D(
            [],
            [],
            label=one_line(names[label], MAX_NAME) if names else f"class {label}",
            color=class_colour(label),
        )
        for label in labels
    ]


def draw_tokens(
    image: np.ndarray, grids: Sequence[TokenGrid], encoders: Sequence[EncoderUpdates]
) -> Figure:
    """Draw a panel for each scale, and below them the scales' shares and a chart per encoder.

    Args:
        image: RGB, ``[H, W, 3]`` uint8.
        grids: of the scales, finest first.
        encoders: with counts for the same scales.
    """
    height = GRID_PANEL_WIDTH * image.shape[0] / image.shape[1] + 0.75
    size = (len(grids) * GRID_PANEL_WIDTH, height + CHART_HEIGHT)
    figure = Figure(figsize=size, layout="constrained")
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
    axis.imshow(fade(image, GRID_FADING))
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
    """Draw a bar for each scale, as wide as its share of the tokens, so that areas are work."""
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
