"""Pictures of detections: colours of classes, boxes with labels, and contact sheets."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from detectron2.structures import Boxes, Instances
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..errors import MissingPackageError
from ..labels import class_label, missing_glyphs, shorten

if TYPE_CHECKING:
    from detectron2.utils.visualizer import Visualizer

# By Okabe and Ito, who chose them for eyes that see fewer colours.
FEW_COLOURS = ("#0072b2", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#e69f00", "#f0e442")
# The colours that follow are some of a grid of this number of shades of red, green and blue.
NUM_SHADES = 8
# In Oklab: neither near to black or white, nor grey.
LIGHTNESS = (0.42, 0.9)
MIN_CHROMA = 0.06

# Relative to the square root of an image's area, and the least in pixels.
FONT_SIZE, MIN_FONT_SIZE = 1 / 42, 9
LINE_WIDTH, MIN_LINE_WIDTH = 1 / 280, 1.2
# Of the font's size, around a label's text.
PADDING = 0.15

MAX_TILES = 24
MAX_COLUMNS = 6
# In pixels.
TILE_HEIGHT = 240
CAPTION_HEIGHT = 24
CAPTION_FONT = 16
GAP = 8  # around every tile
# Width to height of tiles; pictures beyond have bars.
TILE_RATIOS = (0.5, 3.0)

SHEET_COLOUR = (255, 255, 255)
BAR_COLOUR = (224, 224, 224)
CAPTION_COLOUR = (0, 0, 0)

Colour = tuple[float, float, float]


def class_colour(number: int) -> Colour:
    """Return a class's colour, always the same: red, green and blue in 0 to 1."""
    colours = palette()
    return colours[number % len(colours)]


@functools.cache
def palette() -> list[Colour]:
    """Return some hundreds of colours, each as far as possible from those before it.

    The first seven can be told apart by colour-blind people.
    """
    codes = [code.removeprefix("#") for code in FEW_COLOURS]
    chosen = [np.frombuffer(bytes.fromhex(code), np.uint8) / 255 for code in codes]
    shades = np.linspace(0, 1, NUM_SHADES)
    colours = np.stack(np.meshgrid(shades, shades, shades), axis=-1).reshape(-1, 3)
    places = oklab(colours)
    chroma = np.hypot(places[:, 1], places[:, 2])
    usable = (places[:, 0] > LIGHTNESS[0]) & (places[:, 0] < LIGHTNESS[1]) & (chroma > MIN_CHROMA)
    colours, places = colours[usable], places[usable]
    distances = np.linalg.norm(places[:, None] - oklab(np.stack(chosen)), axis=-1).min(axis=1)
    for _ in range(len(colours)):
        farthest = distances.argmax()
        chosen.append(colours[farthest])
        new_distances = np.linalg.norm(places - places[farthest], axis=-1)
        distances = np.minimum(distances, new_distances)
    return [tuple(colour.tolist()) for colour in chosen]


def oklab(colours: np.ndarray) -> np.ndarray:
    """Return sRGB colours ``[N, 3]`` in Oklab, where distances are those that eyes see.

    The matrices are those of https://bottosson.github.io/posts/oklab/.
    """
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.cbrt(linear(colours) @ np.transpose(to_cones)) @ np.transpose(to_lab)


def linear(colours: np.ndarray) -> np.ndarray:
    """Return the amounts of light that values of sRGB stand for, all 0 to 1."""
    return np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)


def text_colour(background: Colour) -> str:
    """Return black or white, whichever can be read on a colour: the contrast is 4.58 or more."""
    # Where both contrasts of WCAG are equal: (1 + 0.05) / (L + 0.05) = (L + 0.05) / 0.05.
    return "black" if luminance(background) > math.sqrt(1.05 * 0.05) - 0.05 else "white"


def luminance(colour: Colour) -> float:
    """Return the relative luminance of an sRGB colour, 0 to 1, as WCAG defines it."""
    return float(linear(np.array(colour)) @ (0.2126, 0.7152, 0.0722))


def draw_detections(
    image: np.ndarray, instances: Instances, names: Sequence[str] | None
) -> np.ndarray:
    """Return a copy of an image with its detections, the best on top.

    Args:
        image: RGB, ``[H, W, 3]``.
        instances: on the CPU, with boxes in pixels of the image; the number of an object that is
            tracked stands before its class.
        names: of the classes; None writes their numbers.
    """
    classes = instances.pred_classes.tolist()
    scores = instances.scores.tolist()
    labels = [f"{class_label(c, names)} {score:.0%}" for c, score in zip(classes, scores)]
    if instances.has("track_ids"):
        numbers = instances.track_ids.tolist()
        labels = [f"#{n} {label}" if n > 0 else label for n, label in zip(numbers, labels)]
    return draw_objects(image, instances.pred_boxes, classes, labels)


def draw_objects(
    image: np.ndarray, boxes: Boxes, classes: Sequence[int], labels: Sequence[str]
) -> np.ndarray:
    """Return a copy of an image with boxes in the colours of their classes, the first on top.

    Detectron2's own methods, also those of ``VideoVisualizer``, draw half-transparent boxes in
    random colours, and a label's text in a shade of its colour, over the object. Here text is black
    or white on the class's colour, above the object where there is room, and inside the image.
    Lines and text grow with the image.

    Args:
        image: RGB, ``[H, W, 3]``.
        boxes: in pixels of the image.
        classes: their numbers.
        labels: for Matplotlib, see :func:`lite_detr.labels.matplotlib_label`.

    Raises:
        MissingPackageError: OpenCV or Matplotlib is not installed.
    """
    if not labels:
        return image.copy()
    visualizer = load_visualizer()(image)
    output = visualizer.output
    side = math.sqrt(output.height * output.width)
    line_width = max(MIN_LINE_WIDTH, side * LINE_WIDTH)
    # Matplotlib measures fonts and lines in points.
    points = 72 / output.dpi
    font_size = max(MIN_FONT_SIZE, side * FONT_SIZE)
    renderer = output.canvas.get_renderer()
    with missing_glyphs():
        for box, number, label in reversed([*zip(boxes.tensor.tolist(), classes, labels)]):
            colour = class_colour(number)
            # A dark edge makes light colours visible on light images.
            for width, edge, alpha in ((2 * line_width, "black", 0.3), (line_width, colour, 1)):
                # Private, but nothing else sets the width of a line, which is a quarter of it.
                visualizer._default_font_size = 4 * width * points
                visualizer.draw_box(box, alpha=alpha, edge_color=edge)
            text = output.ax.text(
                0,
                0,
                label,
                size=font_size * points,
                color=text_colour(colour),
                verticalalignment="top",
                bbox={
                    "facecolor": colour,
                    "edgecolor": "none",
                    "pad": PADDING * font_size * points,
                },
            )
            extent = text.get_window_extent(renderer)
            margin = PADDING * font_size
            size = (extent.width + 2 * margin, extent.height + 2 * margin)
            x, y = label_position(box, size, (output.width, output.height), line_width / 2)
            text.set_position((x + margin, y + margin))
        return output.get_image()


def load_visualizer() -> "type[Visualizer]":
    """Import Detectron2's visualizer, whose packages nothing else needs.

    Raises:
        MissingPackageError: OpenCV or Matplotlib is not installed.
    """
    try:
        from detectron2.utils.visualizer import Visualizer
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"pictures need {error.name}: run `pip install matplotlib opencv-python-headless`"
        ) from None
    return Visualizer


def label_position(
    box: Sequence[float],
    label: tuple[float, float],
    image: tuple[float, float],
    border: float = 0.0,
) -> tuple[float, float]:
    """Return the upper left corner of a label: off its object if possible, inside the image.

    Args:
        box: its corners, in pixels.
        label, image: width and height.
        border: half the width of the box's line.
    """
    x0, y0, x1, y1 = box
    x = max(0.0, min(x0 - border, image[0] - label[0]))
    above, below = y0 - border - label[1], y1 + border
    if above >= 0:
        return x, above
    is_low = y1 - y0 < 3 * label[1]
    if is_low and below + label[1] <= image[1]:
        return x, below
    return x, max(0.0, y0 - border)


def contact_sheet(paths: Sequence[str | Path]) -> Image.Image:
    """Return the first ``MAX_TILES`` pictures in rows, each in its own shape above its name.

    All have one height. Pictures of extreme shapes have bars, see ``TILE_RATIOS``.

    Args:
        paths: at least one picture.
    """
    if not paths:
        raise ValueError("a contact sheet needs at least one picture, but none was given")
    paths = [Path(path) for path in paths[:MAX_TILES]]
    tiles = [read_tile(path) for path in paths]
    num_rows = math.ceil(len(tiles) / MAX_COLUMNS)
    columns = math.ceil(len(tiles) / num_rows)
    rows = [
        range(start, min(start + columns, len(tiles))) for start in range(0, len(tiles), columns)
    ]
    widths = [sum(tiles[i].width + GAP for i in row) for row in rows]
    step = TILE_HEIGHT + CAPTION_HEIGHT + GAP
    sheet = Image.new("RGB", (GAP + max(widths), GAP + len(rows) * step), SHEET_COLOUR)
    canvas = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(CAPTION_FONT)
    for y, row in enumerate(rows):
        left, top = GAP, GAP + y * step
        for index in row:
            tile = tiles[index]
            sheet.paste(tile, (left, top))
            middle = (left + tile.width / 2, top + TILE_HEIGHT + CAPTION_HEIGHT / 2)
            caption = shorten(paths[index].name, font, tile.width)
            canvas.text(middle, caption, CAPTION_COLOUR, font, anchor="mm")
            left += tile.width + GAP
    return sheet


def read_tile(path: Path) -> Image.Image:
    """Return a picture in the height of a contact sheet's tiles."""
    with Image.open(path) as picture:
        ratio = min(max(picture.width / picture.height, TILE_RATIOS[0]), TILE_RATIOS[1])
        size = (round(ratio * TILE_HEIGHT), TILE_HEIGHT)
        return ImageOps.pad(picture.convert("RGB"), size, color=BAR_COLOUR)
