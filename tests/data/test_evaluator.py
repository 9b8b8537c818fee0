"""COCO's evaluation, in which an unusable image counts as one without detections."""

import contextlib
import io

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from lite_detr.data.coco import register_coco
from lite_detr.data.evaluator import DetectionEvaluator
from lite_detr.errors import DatasetError


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


def average_precision(content, write, images, missed):
    """AP of perfect detections, but for those of some categories."""
    register_coco("pets", write(content), images, for_evaluation=True)
    evaluator = DetectionEvaluator("pets", distributed=False)
    evaluator.reset()
    for record in DatasetCatalog.get("pets"):
        truth = [a for a in record["annotations"] if a["category_id"] not in missed]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in truth]
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float).reshape(-1, 4))
        instances.pred_classes = torch.tensor([a["category_id"] for a in truth]).long()
        instances.scores = torch.ones(len(truth))
        evaluator.process([record], [{"instances": instances}])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize("area", [None, -1, 0, "9", float("nan"), 1e11, 10**400, True])
def test_a_missed_object_counts_whatever_its_area_says(area, content, write, images):
    """COCO's code ignores objects whose area is negative or above 10^10."""
    content["annotations"][1]["area"] = area
    result = average_precision(content, write, images, missed=[0])
    assert result["AP"] == pytest.approx(50) and result["AP-cat"] == 0


def test_a_missed_object_with_a_box_beyond_every_area_counts(content, write, images):
    content["annotations"][1] |= {"bbox": [0, 0, 1e6, 1e6], "area": 1e12}
    assert average_precision(content, write, images, missed=[0])["AP"] == pytest.approx(50)


@pytest.mark.parametrize("first", [0, -7, 2**62])
@pytest.mark.parametrize("section", ["images", "annotations", "categories"])
def test_the_numbers_that_entries_have_do_not_matter(section, first, content, write, images):
    """COCO's code takes an annotation of id 0 for one that nothing was found for."""
    key = {"images": "image_id", "categories": "category_id"}.get(section)
    renamed = {entry["id"]: first + i for i, entry in enumerate(content[section])}
    for entry in content[section]:
        entry["id"] = renamed[entry["id"]]
    for annotation in content["annotations"] if key else ():
        annotation[key] = renamed[annotation[key]]
    result = average_precision(content, write, images, missed=[])
    assert result["AP"] == pytest.approx(100)
    assert {name for name in result if name.startswith("AP-")} == {"AP-cat", "AP-dog"}


@pytest.mark.parametrize("flag", [0, 1, True, False, 1.0, None])
def test_crowd_flags(flag, content, write, images):
    if flag is None:
        del content["annotations"][1]["iscrowd"]
    else:
        content["annotations"][1]["iscrowd"] = flag
    result = average_precision(content, write, images, missed=[0])
    # A crowd region that is missed costs nothing.
    assert result["AP"] == pytest.approx(100 if flag else 50)


def test_no_entry_but_what_is_needed(content, write, images):
    """No info, no licences: pycocotools 2.0.10 copies what is not there."""
    assert content.keys() == {"images", "annotations", "categories"}
    assert average_precision(content, write, images, missed=[])["AP"] == pytest.approx(100)


def test_equal_names_of_classes_are_refused(content, write, images):
    register_coco("pets", write(content), images)
    MetadataCatalog.get("pets").thing_classes[0] = "dog"
    with pytest.raises(DatasetError, match="two categories have the name 'dog'"):
        DetectionEvaluator("pets")


def test_the_metadata_of_the_dataset_stay_as_they_are(content, write, images):
    register_coco("pets", write(content), images)
    before = MetadataCatalog.list(), MetadataCatalog.get("pets").as_dict()
    DetectionEvaluator("pets", distributed=False)
    assert (MetadataCatalog.list(), MetadataCatalog.get("pets").as_dict()) == before
