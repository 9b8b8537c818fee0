"""Many pictures on one sheet, for a person to look through."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from lite_detr.engine.pictures import shorten

MAX_TILES = 24
MAX_COLUMNS = 6
TILE_SIDE = 320  # px
CAPTION_HEIGHT = 24  # px
GAP = 8  # px, around every tile
FONT_SIZE = 16  # px

SHEET_COLOUR = (255, 255, 255)
TILE_COLOUR = (224, 224, 224)
CAPTION_COLOUR = (0, 0, 0)


def contact_sheet(paths: Sequence[str | Path]) -> Image.Image:
    """The first ``MAX_TILES`` pictures in rows of equal tiles, with their file names below them.

    A picture is scaled to fill its tile in one direction; its aspect is kept.

    Args:
        paths: of the pictures; at least one.
    """
    if not paths:
        raise ValueError("a contact sheet needs at least one picture, but none was given")
    paths = [Path(path) for path in paths[:MAX_TILES]]
    rows = math.ceil(len(paths) / MAX_COLUMNS)
    columns = math.ceil(len(paths) / rows)
    step_x, step_y = TILE_SIDE + GAP, TILE_SIDE + CAPTION_HEIGHT + GAP
    sheet = Image.new("RGB", (GAP + columns * step_x, GAP + rows * step_y), SHEET_COLOUR)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    for index, path in enumerate(paths):
        row, column = divmod(index, columns)
        x, y = GAP + column * step_x, GAP + row * step_y
        with Image.open(path) as picture:
            tile = ImageOps.pad(picture.convert("RGB"), (TILE_SIDE, TILE_SIDE), color=TILE_COLOUR)
        sheet.paste(tile, (x, y))
        middle = (x + TILE_SIDE / 2, y + TILE_SIDE + CAPTION_HEIGHT / 2)
        draw.text(middle, shorten(path.name, font, TILE_SIDE), CAPTION_COLOUR, font, anchor="mm")
    return sheet
