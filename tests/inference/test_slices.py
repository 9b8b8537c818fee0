"""Slices of large pictures, by SAHI, with a stub that finds bright rectangles."""

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from scipy import ndimage
from torch import nn

from lite_detr.data.image_files import read_image
from lite_detr.errors import MissingPackageError
from lite_detr.inference.video import Frame

RED, BLUE = (255, 0, 0), (0, 0, 255)


class FindsRectangles:
    """Finds rectangles of 20 pixels or more a side: red ones are of class 0, blue ones of class 1.

    The score is a half, and more for larger ones.
    """

    def __init__(self, threshold=0.3):
        self.threshold = threshold
        self.model = nn.Linear(1, 1)
        self.metadata = SimpleNamespace(thing_classes=["red", "blue"])
        self.shapes = []

    def read_rgb(self, path):
        return read_image(str(path), "RGB")

    def predict_images(self, images):
        self.shapes.append([image.shape[:2] for image in images])
        return [self.find(image) for image in images]

    def find(self, image):
        boxes, kinds = [], []
        for kind, channel in enumerate((0, 2)):
            for rows, columns in ndimage.find_objects(ndimage.label(image[:, :, channel] > 127)[0]):
                box = [columns.start, rows.start, columns.stop, rows.stop]
                if box[2] - box[0] >= 20 and box[3] - box[1] >= 20:
                    boxes.append(box)
                    kinds.append(kind)
        found = Instances(image.shape[:2])
        found.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4).float())
        found.scores = 0.5 + found.pred_boxes.area() / 100_000
        found.pred_classes = torch.tensor(kinds).long()
        return found


def picture(*rectangles):
    """An image of 400 x 300 pixels with coloured rectangles (x1, y1, x2, y2)."""
    pixels = np.zeros((300, 400, 3), dtype=np.uint8)
    for colour, (x1, y1, x2, y2) in rectangles:
        pixels[y1:y2, x1:x2] = colour
    return pixels


# In the first slice; across two; at the far corner; and larger than any.
OBJECTS = [
    (RED, (10, 10, 50, 40)),
    (BLUE, (80, 100, 110, 140)),
    (RED, (360, 265, 400, 300)),
    (BLUE, (200, 20, 390, 180)),
]


@pytest.fixture
def slices():
    pytest.importorskip("sahi")
    return importlib.import_module("lite_detr.inference.slices")


def found(instances):
    boxes = [tuple(map(int, box)) for box in instances.pred_boxes.tensor.tolist()]
    return sorted(zip(instances.pred_classes.tolist(), boxes))


def expected(objects):
    return sorted((int(colour == BLUE), box) for colour, box in objects)


def test_objects_lie_where_they_are_in_the_picture_and_are_found_once(slices):
    detector = FindsRectangles()
    instances, best = slices.SlicedDetector(detector, 100).predict_image(picture(*OBJECTS), 3)
    assert instances.image_size == (300, 400) and best == pytest.approx(0.804)
    assert found(instances) == expected(OBJECTS)
    assert instances.scores.tolist() == sorted(instances.scores.tolist(), reverse=True)
    assert instances.scores[-1] == pytest.approx(0.512)
    # Slices of one size in batches, and the picture as a whole.
    assert set(detector.shapes[0]) == {(100, 100)} and len(detector.shapes[0]) == 3
    assert detector.shapes[-1] == [(300, 400)]


def test_the_threshold_drops_detections_and_the_best_score_remains(slices):
    sliced = slices.SlicedDetector(FindsRectangles(threshold=0.65), 100)
    image = picture(OBJECTS[0])
    instances, best = sliced.predict_image(image)
    assert len(instances) == 0 and best == pytest.approx(0.512)
    assert instances.pred_boxes.tensor.shape == (0, 4)
    assert sliced.predict_image(picture())[1] is None


def test_files_and_frames(slices, tmp_path):
    sliced = slices.SlicedDetector(FindsRectangles(), 100)
    Image.fromarray(picture(*OBJECTS)).save(tmp_path / "sound.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    paths = [tmp_path / "broken.png", tmp_path / "sound.png"]
    broken, sound = sliced.predict_files(paths)
    assert broken.instances is None and "unreadable" in broken.problem
    assert sound.path == paths[1] and found(sound.instances) == expected(OBJECTS)
    # Frames are BGR.
    frame = Frame(0, 0.0, picture(*OBJECTS)[:, :, ::-1])
    [prediction] = sliced.predict_frames([frame])
    assert prediction.frame is frame and found(prediction.instances) == expected(OBJECTS)


def test_sahis_own_functions_take_the_detector(slices):
    from sahi.predict import get_prediction

    result = get_prediction(picture(*OBJECTS), slices.SahiModel(FindsRectangles()))
    names = [each.category.name for each in result.object_prediction_list]
    assert sorted(names) == ["blue", "blue", "red", "red"]


def test_without_sahi_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sahi.models.base", None)
    monkeypatch.delitem(sys.modules, "lite_detr.inference.slices", raising=False)
    with pytest.raises(MissingPackageError, match="slices need SAHI .*: run `pip install sahi`"):
        importlib.import_module("lite_detr.inference.slices")
