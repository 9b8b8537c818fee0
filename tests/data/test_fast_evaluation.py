"""COCO's metrics by faster-coco-eval: the figures of pycocotools."""

import contextlib
import io
import math
import sys

import numpy as np
import pytest
import torch
from detectron2.evaluation import coco_evaluation
from detectron2.structures import Boxes, Instances

from lite_detr.data.coco import register_coco
from lite_detr.data.evaluator import DetectionEvaluator
from lite_detr.errors import MissingPackageError

SIDE = 400
# Neither contiguous nor from 1 on. One of them has no object, and one only crowd regions.
CATEGORIES = {0: "none", 4: "crowd", 9: "small", 90: "large", 31: "medium"}
SIDES = {4: (50, 300), 9: (3, 40), 31: (30, 100), 90: (90, 350)}


@pytest.fixture
def pets(content, write, images):
    """Twelve images with objects of all areas, and detections near them: tied, many, or none."""
    rng = np.random.default_rng(0)
    ids = [0, -7, 2**40, *range(12, 21)]
    content["images"] = [
        {"id": i, "file_name": "a.jpg", "width": SIDE, "height": SIDE} for i in ids
    ]
    content["categories"] = [{"id": i, "name": name} for i, name in CATEGORIES.items()]
    content["annotations"], detections = [], {}
    numbers = {category: number for number, category in enumerate(sorted(CATEGORIES))}
    for position, image in enumerate(ids):
        found = []
        # The first has no object, and the second no detection.
        for _ in range(rng.integers(1, 12) if position else 0):
            category = int(rng.choice(list(SIDES)))
            sides = rng.integers(*SIDES[category], 2)
            corner = rng.integers(0, SIDE - sides)
            content["annotations"].append(
                {
                    "id": len(content["annotations"]),
                    "image_id": image,
                    "category_id": category,
                    "bbox": [*corner.tolist(), *sides.tolist()],
                    # Of a mask, not of the box.
                    "area": float(sides.prod() * rng.uniform(0.4, 1)),
                    "iscrowd": int(category == 4 or rng.random() < 0.2),
                }
            )
            near = np.concatenate([corner, corner + sides])
            for _ in range(rng.integers(0, 40)):
                box = near + rng.normal(0, 0.1, 4) * np.tile(sides, 2)
                kind = rng.choice([numbers[category], rng.integers(len(CATEGORIES))], p=[0.8, 0.2])
                found.append((box, kind, round(rng.random(), 2)))
        detections[image] = [] if position == 1 else found
    assert max(map(len, detections.values())) > 150
    register_coco("pets", write(content), images, for_evaluation=True)
    return detections


def evaluate(detections, **options):
    evaluator = DetectionEvaluator("pets", ("bbox",), distributed=False, **options)
    evaluator.reset()
    for image, found in detections.items():
        instances = Instances((SIDE, SIDE))
        boxes, kinds, scores = zip(*found) if found else ((), (), ())
        instances.pred_boxes = Boxes(torch.tensor(np.array(boxes).reshape(-1, 4)).float())
        instances.pred_classes = torch.tensor(kinds).long()
        instances.scores = torch.tensor(scores)
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize("limit", [None, 5, 300])
def test_all_figures_are_those_of_pycocotools(pets, limit):
    pytest.importorskip("faster_coco_eval")
    before = vars(coco_evaluation).copy()
    found = evaluate(pets, use_fast_impl=True, max_dets_per_image=limit)
    assert vars(coco_evaluation) == before
    expected = evaluate(pets, use_fast_impl=False, max_dets_per_image=limit)
    assert found.keys() == expected.keys() > {"AP", "AP50", "APs", "AP-small", "AP-crowd"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name
    assert math.isnan(found["AP-none"]) and 1 < found["AP"] < 99


def test_without_any_detection(pets):
    pytest.importorskip("faster_coco_eval")
    nothing = dict.fromkeys(pets, ())
    assert not evaluate(nothing, use_fast_impl=True)["AP"] > 0


def test_without_the_package_it_is_an_error_before_inference(pets, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core.coco", None)
    evaluate(dict.fromkeys(pets, ()))
    # As where Detectron2's own is not built.
    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", coco_evaluation.COCOeval)
    with pytest.raises(MissingPackageError, match="run `pip install faster-coco-eval`, or leave"):
        DetectionEvaluator("pets", use_fast_impl=True)
