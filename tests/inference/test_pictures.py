"""Colours of classes, labels on pictures, and contact sheets."""

import itertools

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from lite_detr.inference import pictures
from lite_detr.inference.pictures import class_colour, contact_sheet, draw_detections

NAMES = [
    "$_a^b$",
    "US$_5^$ 100%",
    "a\nb",
    "שלום %s {0}",
    "\N{GRINNING FACE}",
    "\udcff",
    "x" * 99,
    "",
]


def as_bytes(colour):
    return (np.array(colour) * 255).round().astype(int)


def contrast(one, other):
    """As WCAG defines it, from values of 0 to 255."""
    levels = [
        sum(
            weight * (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4)
            for weight, v in zip((0.2126, 0.7152, 0.0722), np.divide(colour, 255))
        )
        for colour in (one, other)
    ]
    return (max(levels) + 0.05) / (min(levels) + 0.05)


def found(size, boxes, classes):
    instances = Instances(size, pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))
    instances.pred_classes = torch.tensor(classes)
    instances.scores = torch.linspace(0.9, 0.5, len(classes))
    return instances


def test_eighty_classes_differ_and_their_text_can_be_read():
    colours = [as_bytes(class_colour(number)) for number in range(80)]
    for one, other in itertools.combinations(colours, 2):
        assert np.abs(one - other).max() >= 25
    text = {"black": (0, 0, 0), "white": (255, 255, 255)}
    for number, colour in enumerate(colours):
        assert contrast(colour, text[pictures.text_colour(class_colour(number))]) >= 4.5
    # Any number has a colour, and keeps it.
    assert len(class_colour(10**6)) == 3
    pictures.palette.cache_clear()
    assert (as_bytes(class_colour(79)) == colours[79]).all()


@pytest.mark.parametrize("size", [(96, 96), (480, 640), (1600, 1200)])
def test_a_class_has_its_colour_in_pictures_of_every_size(size):
    height, width = size
    boxes = np.array([[0.1, 0.3, 0.4, 0.8], [0.6, 0.3, 0.9, 0.8]]) * (width, height, width, height)
    image = np.full((height, width, 3), 128, np.uint8)
    drawn = draw_detections(image, found(size, boxes.tolist(), [1, 2]), None)
    assert drawn.shape == image.shape and (image == 128).all()
    for box, number in zip(boxes, (1, 2)):
        row = drawn[round((box[1] + box[3]) / 2)].astype(int)
        line = (np.abs(row - as_bytes(class_colour(number))).max(axis=1) < 40).sum()
        # Two vertical lines, thicker in larger pictures.
        assert 1 <= line <= 2 + max(2, round(2.5 * (height * width) ** 0.5 / 280)), line


def test_a_label_has_contrast_where_it_is_drawn():
    image = np.full((240, 320, 3), 200, np.uint8)
    drawn = draw_detections(image, found((240, 320), [[100, 100, 200, 200]], [0]), ["cell"])
    label = drawn[84:98, 101:140].reshape(-1, 3)
    assert contrast(label.min(axis=0), label.max(axis=0)) >= 4.5
    assert (label == as_bytes(class_colour(0))).all(axis=1).mean() > 0.3


def test_every_name_is_drawn_without_warnings(recwarn):
    boxes = [[10.0, 10, 60, 60]] * len(NAMES)
    drawn = draw_detections(
        np.zeros((80, 96, 3), np.uint8), found((80, 96), boxes, range(len(NAMES))), NAMES
    )
    assert drawn.any() and not recwarn.list


@pytest.mark.parametrize(
    "box, corner",
    {
        (50, 40, 90, 80): (50, 30),
        (50, 0, 90, 80): (50, 0),
        (50, 0, 90, 20): (50, 20),
        (150, 40, 160, 80): (120, 30),
        (0, 0, 160, 120): (0, 0),
        (10, 5, 20, 119): (10, 5),
    }.items(),
)
def test_a_label_stands_above_its_box_if_there_is_room(box, corner):
    assert pictures.label_position(box, (40, 10), (160, 120)) == corner


def test_tiles_of_a_sheet_have_the_shapes_of_their_pictures(tmp_path):
    paths = []
    for name, size in {"wide": (90, 60), "tall": (60, 90), "strip": (500, 20)}.items():
        paths.append(tmp_path / f"{name}.png")
        Image.new("RGB", size, "red").save(paths[-1])
    pixels = np.asarray(contact_sheet(paths))
    tile, gap = pictures.TILE_HEIGHT, pictures.GAP
    assert pixels.shape[0] == tile + pictures.CAPTION_HEIGHT + 2 * gap
    is_red = (pixels[gap + tile // 2] == (255, 0, 0)).all(axis=1)
    edges = np.flatnonzero(np.diff(is_red.astype(int)))
    assert np.diff(edges)[::2].tolist() == [tile * 3 // 2, tile * 2 // 3, tile * 3]
    # The strip is wider than any tile.
    top = pixels[gap, -gap - 10]
    assert (top == pictures.BAR_COLOUR).all()
    captions = pixels[gap + tile : -gap, : edges[1]]
    assert (captions < 128).any(), "no file name"


def test_contact_sheet_of_many(tmp_path):
    path = tmp_path / f"{'long_' * 30}name.png"
    Image.new("L", (60, 60), 255).save(path)
    sheet = contact_sheet([path] * 30)
    step = pictures.TILE_HEIGHT + pictures.GAP
    assert sheet.size == (
        6 * step + pictures.GAP,
        4 * (step + pictures.CAPTION_HEIGHT) + pictures.GAP,
    )
    gaps = np.asarray(sheet)[:, pictures.GAP + pictures.TILE_HEIGHT :: step]
    assert (gaps == 255).all(), "a name leaves its tile"
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([])
