"""Draws where attention looks: samples on an image, coloured by weight, marked by scale."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances
from feature_scales import MARKERS, scale_name
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from lite_detr.analysis.attention_maps import Samples

PANEL_WIDTH = 4.4  # inches
FADING = 0.4  # of the image towards white, for points to stand out
COLOUR_MAP = "plasma"
BOX_COLOURS = ("#0072b2", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#555555")
LINE_STYLES = ("-", "--", ":", "-.")
MARKER_AREA = 30  # square points
QUERY = {"marker": "*", "color": "#00e5ff", "markeredgecolor": "black", "linestyle": ""}


@dataclass(frozen=True)
class Panel:
    """Samples that share a picture.

    Attributes:
        title: what they are.
        samples: where they lie.
        query: ``(x, y)`` in the image's ``[0, 1]`` frame of the query that they are of, if one.
    """

    title: str
    samples: Samples
    query: tuple[float, float] | None = None


@dataclass(frozen=True)
class Row:
    """What a model does on the image.

    Attributes:
        title: which model and attention it is.
        instances: its detections, drawn as boxes.
        strides: of its scales, finest first.
        panels: from left to right.
    """

    title: str
    instances: Instances
    strides: list[int]
    panels: list[Panel]


def draw_attention(image: np.ndarray, rows: Sequence[Row], metadata: Metadata | None) -> Figure:
    """A row of panels for each model, with a colour bar under each panel.

    Args:
        image: RGB, ``[H, W, 3]`` uint8.
        rows: of the same number of panels.
        metadata: names the classes; None writes their numbers.
    """
    columns = len(rows[0].panels)
    height = PANEL_WIDTH * image.shape[0] / image.shape[1] + 1.5
    figure = plt.figure(figsize=(columns * PANEL_WIDTH, len(rows) * height), layout="constrained")
    for row, part in zip(rows, np.atleast_1d(figure.subfigures(len(rows)))):
        draw_row(part, image, row, metadata)
    return figure


def draw_row(part: SubFigure, image: np.ndarray, row: Row, metadata: Metadata | None) -> None:
    part.suptitle(row.title, fontsize=13, fontweight="bold")
    faded = (255 - (255 - image.astype(float)) * (1 - FADING)).astype(np.uint8)
    for axis, panel in zip(part.subplots(1, len(row.panels), squeeze=False)[0], row.panels):
        axis.imshow(faded)
        axis.set_title(panel.title, fontsize=11)
        axis.set(xticks=[], yticks=[], xlim=(0, image.shape[1]), ylim=(image.shape[0], 0))
        draw_boxes(axis, row.instances)
        draw_samples(axis, panel, image.shape[:2])
    handles = scale_handles(row) + class_handles(row.instances, metadata)
    if any(panel.query is not None for panel in row.panels):
        handles.append(Line2D([], [], markersize=13, label="query", **QUERY))
    add_legend(part, handles)


def add_legend(part: SubFigure, handles: list[Line2D]) -> None:
    """Below the panels, in as few lines as its width allows."""
    for columns in range(len(handles), 0, -1):
        legend = part.legend(
            handles=handles, loc="outside lower center", ncols=columns, fontsize=11
        )
        if columns == 1 or legend.get_window_extent().width <= part.bbox.width:
            return
        legend.remove()


def draw_boxes(axis: Axes, instances: Instances) -> None:
    for (x0, y0, x1, y1), label in zip(
        instances.pred_boxes.tensor.tolist(), instances.pred_classes.tolist()
    ):
        axis.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], linewidth=1.2, **class_style(label))


def draw_samples(axis: Axes, panel: Panel, size: tuple[int, int]) -> None:
    height, width = size
    points, weights, levels = (tensor.cpu().float().numpy() for tensor in panel.samples)
    # An image may have no sample inside; its colour bar then is that of all weights.
    limits = (weights.min(), weights.max()) if len(weights) else (0, 1)
    scale = matplotlib.cm.ScalarMappable(plt.Normalize(*limits), COLOUR_MAP)
    # The heaviest of a scale come last, and the finest scale: on top of the others.
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
    bar = axis.figure.colorbar(scale, ax=axis, location="bottom", shrink=0.8, aspect=30, pad=0.02)
    bar.set_label("attention weight", fontsize=10)
    bar.locator = matplotlib.ticker.MaxNLocator(5)
    bar.update_ticks()


def scale_handles(row: Row) -> list[Line2D]:
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
    return [
        Line2D([], [], label=names[label] if names else f"class {label}", **class_style(label))
        for label in sorted(set(instances.pred_classes.tolist()))
    ]


def class_style(label: int) -> dict[str, str]:
    """Colours of lines, and where they have been used up, other dashes."""
    turn, colour = divmod(label, len(BOX_COLOURS))
    return {
        "color": BOX_COLOURS[colour],
        "linestyle": LINE_STYLES[turn % len(LINE_STYLES)],
    }
