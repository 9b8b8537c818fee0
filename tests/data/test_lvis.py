"""LVIS's metrics, by the lvis package through Detectron2's evaluator, on a tiny dataset."""

import contextlib
import io
import sys

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from lite_detr.data.evaluator import LVISDetectionEvaluator
from lite_detr.errors import MissingPackageError


@pytest.fixture
def tiny_lvis(write):
    """Two images; the first has a rare and a common object, the second a frequent one."""
    content = {
        "categories": [
            {"id": number, "name": name, "frequency": name[0]}
            for number, name in enumerate(("rare", "common", "frequent"), start=1)
        ],
        "images": [
            # Absent for sure, and labelled only in part: detections of class 3 do not count here.
            {"id": 1, "neg_category_ids": [2], "not_exhaustive_category_ids": []},
            {"id": 2, "neg_category_ids": [1], "not_exhaustive_category_ids": [3]},
        ],
        "annotations": [
            annotation(1, 1, 1, [10, 10, 30, 40]),
            annotation(2, 1, 2, [50, 10, 40, 40]),
            annotation(3, 2, 3, [10, 10, 50, 60]),
        ],
    }
    for image in content["images"]:
        image |= {"width": 100, "height": 80, "coco_url": f"http://host/val/{image['id']}.jpg"}
    names = [category["name"] for category in content["categories"]]
    MetadataCatalog.get("tiny_lvis").set(
        json_file=str(write(content)), evaluator_type="lvis", thing_classes=names
    )


def annotation(number, image, category, box):
    x, y, width, height = box
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": width * height,
        "segmentation": [polygon],
    }


def evaluate(found, **of_second):
    """Evaluate (box, class from 0 on) of both images."""
    evaluator = LVISDetectionEvaluator("tiny_lvis", distributed=False)
    evaluator.reset()
    for image_id, objects in enumerate(found, start=1):
        boxes, classes = zip(*objects)
        instances = Instances((80, 100))
        instances.pred_boxes = Boxes(torch.tensor(boxes).float())
        instances.pred_classes = torch.tensor(classes)
        instances.scores = torch.linspace(0.9, 0.5, len(objects))
        sample = {"image_id": image_id} | (of_second if image_id == 2 else {})
        evaluator.process([sample], [{"instances": instances}])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()


FIRST = [([10, 10, 40, 50], 0), ([50, 10, 90, 50], 1)]
SECOND = [([70, 10, 90, 40], 2), ([10, 10, 60, 70], 2)]


def test_rare_common_and_frequent_classes_are_measured_with_todays_numpy(tiny_lvis):
    pytest.importorskip("lvis")
    results = evaluate([FIRST, SECOND])["bbox"]
    # The false box of class 3 does not count, as the image is not labelled in full.
    assert [results[name] for name in ("AP", "APr", "APc", "APf")] == pytest.approx([100] * 4)
    wrong = [(FIRST[0][0], 1), (FIRST[1][0], 0)]
    results = evaluate([wrong, SECOND])["bbox"]
    assert [results[name] for name in ("APr", "APc", "APf")] == pytest.approx([0, 0, 100])
    assert not hasattr(np, "float")


def test_an_unusable_image_has_no_detections(tiny_lvis, warnings):
    pytest.importorskip("lvis")
    results = evaluate([FIRST, SECOND], unusable="unreadable image", file_name="2.jpg")
    assert results["bbox"]["APf"] == 0 and results["unusable"] == {"images": 1}
    assert "2.jpg: unreadable image" in warnings[0]


def test_without_the_package_it_is_an_error_before_inference(tiny_lvis, monkeypatch):
    monkeypatch.setitem(sys.modules, "lvis", None)
    with pytest.raises(MissingPackageError, match="LVIS's metrics need lvis: run `pip install lvi"):
        LVISDetectionEvaluator("tiny_lvis")
