"""Show what a detector does on one image: its objects, where its queries look, what it updates.

This is the model's side of ``demo/app.py``; it knows nothing of the page.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from ..data.image_files import IMAGE_FORMATS, TOO_LARGE, read_image
from ..errors import ImageError, UnknownPartError
from ..inference.pictures import draw_detections
from ..inference.predictor import TrainedDetector
from ..modeling import KeyAwareDeformableAttention
from ..modeling.heads import Predictions
from .attention_maps import AttentionMap, attention_names, record_attention
from .figures import (
    COLOURS,
    SAMPLE_FADING,
    EncoderUpdates,
    Panel,
    TokenGrid,
    draw_boxes,
    draw_grid,
    draw_samples,
    fade,
    scale_name,
    scale_strides,
)
from .token_updates import count_layers, encoder_name, make_grids, updated_levels

# Of a file that strangers may send.
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
OVERSIZED = "file too large"
# The longer side in pixels of the image that is shown, so that lines and labels are sharp on small
# ones, and of the pictures beside each other.
SHOWN_SIDES = (960, 1600)
PANEL_SIDE = 480
DPI = 100
SAMPLES_OF_ONE_QUERY = 100
SAMPLES_OF_ALL_QUERIES = 200
# Runs of each detector that are timed, and the time after which no further ones begin.
ROUNDS, PATIENCE = 5, 10.0  # seconds

# As ``MARKERS`` of figures.
GLYPHS = "●■▲◆✚✖"

Point = tuple[float, float]


class Picture(NamedTuple):
    """A picture with its caption.

    Attributes:
        caption: one line.
        pixels: RGB, ``[H, W, 3]`` uint8.
    """

    caption: str
    pixels: np.ndarray


@dataclass(eq=False)
class View:
    """An image as a detector sees it.

    Attributes:
        image: as it is shown, RGB, ``[H, W, 3]`` uint8.
        small: the same, for the pictures beside each other.
        inputs: the model's.
        instances: all detections, best first, in pixels of ``image``.
        queries: ``[N]``, the query that made each of them.
        maps: the attention maps that have been recorded, by name.
    """

    image: np.ndarray
    small: np.ndarray
    inputs: dict
    instances: Instances
    queries: Tensor
    maps: dict[str, AttentionMap] = field(default_factory=dict)


class Explorer:
    """A trained detector to explore.

    Args:
        cfg: lazy config; ``train.init_checkpoint`` gives the weights.

    Attributes:
        title: the kind of detector and of its encoder.
        attentions: the names of its deformable attentions, by what they are called on a page; empty
            if it has none.
        layers: the scales whose tokens each encoder layer updates, see :func:`updated_levels`.
        updates: the number of updates of each scale; None without deformable attention.
    """

    def __init__(self, cfg: DictConfig):
        self.detector = TrainedDetector(cfg)
        model = self.detector.model
        self.attentions = {
            title: name
            for part in ("encoder", "decoder")
            for title, name in describe_attentions(model, part)
        }
        self.title = type(model).__name__
        self.strides: list[int] = []
        self.layers: list[tuple[int, ...]] = []
        self.updates: EncoderUpdates | None = None
        if self.attentions:
            self.strides = scale_strides(model)
            name = encoder_name(model.encoder, len(self.strides))
            self.title += f" with {name}"
        if attention_names(model, "encoder"):
            self.layers = updated_levels(model.encoder)
            self.updates = EncoderUpdates(name, count_layers(self.layers, len(self.strides)))
            self.title += f", {self.default_attention.rpartition(' ')[2]}"

    @property
    def default_attention(self) -> str | None:
        """The title of the encoder's last attention, or else of the decoder's."""
        encoder = [title for title in self.attentions if title.startswith("Encoder")]
        return (encoder or list(self.attentions) or [None])[-1]

    @property
    def class_names(self) -> Sequence[str] | None:
        return self.detector.metadata.thing_classes if self.detector.metadata else None

    def view(self, path: str | Path) -> View:
        """Run the detector on an image file.

        Raises:
            ImageError: the image cannot be used.
        """
        image, inputs = self.detector.read(path)
        image = resize(image, *SHOWN_SIDES)
        inputs |= dict(zip(("height", "width"), image.shape[:2]))
        model = self.detector.model
        raw = model.forward_queries([inputs])
        predictions = Predictions(raw["pred_logits"], raw["pred_boxes"])
        (output,) = model.postprocess(predictions, [inputs], [inputs["image"].shape[1:]])
        instances = output["instances"].to("cpu")
        queries = find_queries(instances, raw["pred_boxes"][0].cpu())
        return View(image, resize(image, PANEL_SIDE, PANEL_SIDE), inputs, instances, queries)

    def attention(self, view: View, title: str) -> AttentionMap:
        """Return the map of an attention; the model runs if it has not been recorded yet.

        Raises:
            UnknownPartError: the detector has no attention of this title.
        """
        if title not in self.attentions:
            raise UnknownPartError(
                f"the detector has no attention {title}: choose one of "
                f"{', '.join(self.attentions) or '(none)'}"
            )
        name = self.attentions[title]
        if name not in view.maps:
            with record_attention(self.detector.model, [name]) as maps:
                self.detector.predict(view.inputs)
            # One at a time, as that of a large image takes hundreds of megabytes.
            view.maps = {name: maps[0]}
        return view.maps[name]

    def query(self, view: View, title: str, point: Point, threshold: float) -> int:
        """Return the query of a point in the image's ``[0, 1]`` frame.

        In an encoder this is the token there; in a decoder, the query of the smallest detection
        around it that reaches the threshold, or else the nearest one.
        """
        attention = self.attention(view, title)
        height, width = view.image.shape[:2]
        shown = view.instances[view.instances.scores >= threshold]
        found = find_detection(shown.pred_boxes.tensor, (point[0] * width, point[1] * height))
        if title.startswith("Encoder") or found is None:
            return attention.nearest_query(point)
        # The best come first, so that numbers among those shown are numbers among all.
        return int(view.queries[found])

    def look(
        self, view: View, title: str, query: int | None, threshold: float
    ) -> tuple[str, list[Picture]]:
        """Return what the query is, and where it looks: on all scales, and on each.

        Args:
            title: of the attention, one of :attr:`attentions`.
            query: its index; None shows the heaviest samples of all queries.
            threshold: detections with a lower score are not drawn.
        """
        attention = self.attention(view, title)
        chosen = slice(None) if query is None else query
        shares = attention.weights[0, chosen].float().reshape(-1, *attention.weights.shape[2:])
        shares = shares.sum(-1).mean((0, 1)).tolist()
        count = SAMPLES_OF_ALL_QUERIES if query is None else SAMPLES_OF_ONE_QUERY
        point = None if query is None else attention.point_of(query)
        shown = view.instances[view.instances.scores >= threshold]
        size = view.image.shape[:2]
        pictures = []
        for level in (None, *range(attention.scales.num_levels)):
            samples = attention.strongest(count, query=query, level=level)
            caption = f"all scales · {len(samples.weights)} places"
            if level is not None:
                caption = f"{self.scale(level)} · {shares[level]:.0%} of the attention"
            axis = picture_axis(view.small)
            axis.imshow(fade(view.small, SAMPLE_FADING), extent=(0, size[1], size[0], 0))
            draw_boxes(axis, shown)
            draw_samples(axis, Panel(caption, samples, point), size)
            pictures.append(Picture(caption, pixels(axis)))
        return self.describe_query(attention, query), pictures

    def describe_query(self, attention: AttentionMap, query: int | None) -> str:
        if query is None:
            return f"All {attention.weights.shape[1]:,} queries of this layer"
        level = attention.level_of(query)
        if level is not None:
            return f"A token of {self.scale(level)}"
        is_token = attention.name.startswith("encoder")
        return f"Token {query} of those chosen" if is_token else f"Object query {query}"

    def scale(self, level: int) -> str:
        return f"{GLYPHS[level]} {scale_name(self.strides[level])}"

    def grids(self, view: View) -> list[TokenGrid]:
        """Return the tokens of an image, in its small form; none without deformable attention."""
        if not self.attentions:
            return []
        attention = next(iter(view.maps.values()), None)
        attention = attention or self.attention(view, self.default_attention)
        inputs = view.inputs | dict(zip(("height", "width"), view.small.shape[:2]))
        return make_grids(self.strides, attention.scales.shapes, inputs)

    def draw_grids(self, view: View) -> list[Picture]:
        """Return the image with the cells of each scale."""
        pictures = []
        for level, grid in enumerate(self.grids(view)):
            caption = f"{scale_name(grid.stride)}, stride {grid.stride}: {grid.tokens:,} tokens"
            axis = picture_axis(view.small)
            draw_grid(axis, view.small, grid, COLOURS[level])
            pictures.append(Picture(caption, pixels(axis)))
        return pictures

    def draw(self, view: View, threshold: float) -> tuple[np.ndarray, int]:
        """Return the image with the detections that reach the threshold, and their number.

        The model does not run.
        """
        shown = view.instances[view.instances.scores >= threshold]
        return draw_detections(view.image, shown, self.class_names), len(shown)


def check_upload(path: str | Path) -> None:
    """Check the size of a file from a stranger before it is decoded.

    Raises:
        ImageError: it has more than ``MAX_BYTES`` bytes or ``MAX_PIXELS`` pixels, or is not an
            image.
    """
    size = Path(path).stat().st_size
    if size > MAX_BYTES:
        raise ImageError(
            OVERSIZED,
            f"it has {size / 2**20:.1f} MB, accepted are {MAX_BYTES / 2**20:g}: save it smaller",
        )
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
    # Of files that are no image, or have too many pixels for Pillow: reading says so.
    except Exception:
        read_image(str(path), "RGB")
        raise
    if width * height > MAX_PIXELS:
        raise ImageError(
            TOO_LARGE,
            f"it has {width} x {height}, accepted are {MAX_PIXELS / 1e6:g} million: make it "
            "smaller",
        )


def describe_attentions(model: torch.nn.Module, part: str) -> list[tuple[str, str]]:
    """Return what the attentions of a part are called on a page, and their names in the model."""
    names = attention_names(model, part)
    kinds = [isinstance(model.get_submodule(name), KeyAwareDeformableAttention) for name in names]
    return [
        (
            f"{part.capitalize()}, layer {number} of {len(names)} · "
            f"{'key-aware' if is_key_aware else 'plain'}",
            name,
        )
        for number, (name, is_key_aware) in enumerate(zip(names, kinds), start=1)
    ]


def find_queries(instances: Instances, boxes: Tensor) -> Tensor:
    """Return the query ``[N]`` that made each detection.

    Args:
        instances: the detections of one image.
        boxes: ``[Q, 4]`` of all queries, (cx, cy, w, h) in the image's ``[0, 1]`` frame.
    """
    height, width = instances.image_size
    center, size = boxes.float().split(2, dim=1)
    corners = torch.cat([center - size / 2, center + size / 2], dim=1)
    found = Boxes(corners * corners.new_tensor([width, height, width, height]))
    found.clip((height, width))
    return torch.cdist(instances.pred_boxes.tensor, found.tensor, p=1).argmin(1)


def find_detection(boxes: Tensor, point: Point) -> int | None:
    """Return the index of the smallest box ``[N, 4]`` around a point; None if there is none."""
    x, y = point
    around = (boxes[:, 0] <= x) & (x <= boxes[:, 2]) & (boxes[:, 1] <= y) & (y <= boxes[:, 3])
    if not around.any():
        return None
    areas = Boxes(boxes).area()
    return int(areas.where(around, areas.new_tensor(float("inf"))).argmin())


def time_in_turns(explorers: Sequence[Explorer], views: Sequence[View]) -> list[float]:
    """Return the median seconds of each detector on its view, run in turns."""
    times: list[list[float]] = [[] for _ in explorers]
    begin = time.perf_counter()
    for _ in range(ROUNDS):
        for explorer, view, taken in zip(explorers, views, times):
            start = time.perf_counter()
            explorer.detector.predict(view.inputs)
            taken.append(time.perf_counter() - start)
        if time.perf_counter() - begin > PATIENCE:
            break
    return [statistics.median(taken) for taken in times]


def resize(image: np.ndarray, shortest: int, longest: int) -> np.ndarray:
    """Return an image with its longer side between two numbers of pixels."""
    height, width = image.shape[:2]
    ratio = min(max(max(height, width), shortest), longest) / max(height, width)
    size = [max(1, round(ratio * side)) for side in (width, height)]
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def picture_axis(image: np.ndarray) -> Axes:
    """Return axes that fill a figure of an image's size."""
    height, width = image.shape[:2]
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI).add_axes((0, 0, 1, 1))


def pixels(axis: Axes) -> np.ndarray:
    """Return what is drawn on axes of :func:`picture_axis` as RGB, ``[h, w, 3]`` uint8."""
    axis.set_axis_off()
    axis.set_aspect("auto")
    canvas = FigureCanvasAgg(axis.figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
