"""COCO's evaluation, in which an unusable image counts as one without detections."""

import contextlib
import io

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from lite_detr.data.coco import register_coco
from lite_detr.data.evaluator import DetectionEvaluator


@pytest.fixture
def evaluate(content, write, images):
    """Evaluates perfect detections on two images with an object each, some of them unusable."""
    content["annotations"][0] |= {"image_id": 20, "bbox": [5, 5, 20, 30]}
    register_coco("pets", write(content), images, for_evaluation=True)

    def run(*unusable):
        evaluator = DetectionEvaluator("pets", tasks=("bbox",), distributed=False)
        evaluator.reset()
        for record in DatasetCatalog.get("pets"):
            truth = record["annotations"]
            boxes = torch.tensor([a["bbox"] for a in truth], dtype=torch.float).reshape(-1, 4)
            instances = Instances((record["height"], record["width"]))
            instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
            instances.pred_classes = torch.tensor([a["category_id"] for a in truth]).long()
            instances.scores = torch.ones(len(truth))
            if record["image_id"] in unusable:
                record["unusable"] = "unreadable image: cannot be read"
            evaluator.process([record], [{"instances": instances}])
        with contextlib.redirect_stdout(io.StringIO()):
            return evaluator.evaluate()

    return run


def test_without_unusable_images_it_is_cocos_evaluation(evaluate, warnings):
    results = evaluate()
    assert results.keys() == {"bbox"} and results["bbox"]["AP"] == pytest.approx(100)
    assert warnings == []


def test_detections_on_an_unusable_image_do_not_count(evaluate, warnings):
    results = evaluate(20)
    assert results["unusable"] == {"images": 1}
    # One class of two is found in the other image.
    assert results["bbox"]["AP"] == pytest.approx(50)
    (message,) = warnings
    assert message.startswith("1 image(s) are unusable and count as images without detections")
    assert "sub/b.jpg: unreadable image: cannot be read" in message


def test_an_evaluation_of_nothing_but_unusable_images_does_not_fail(evaluate, warnings):
    results = evaluate(10, 20)
    assert results["unusable"] == {"images": 2} and len(warnings) == 1
    assert not results["bbox"]["AP"] > 0
