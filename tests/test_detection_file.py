"""The demo's JSON file; what it holds of a run is in test_demo.py."""

import json
import sys
from pathlib import Path

import pytest
import torch
from detectron2.structures import Boxes, Instances

from lite_detr.inference.predictor import FilePrediction

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

from detection_file import DetectionFile  # noqa: E402


def test_what_a_run_writes_that_fails_or_finds_nothing_can_be_read(tmp_path):
    path = tmp_path / "found.json"
    with DetectionFile(path, None):
        pass
    assert json.loads(path.read_text()) == []
    with pytest.raises(KeyboardInterrupt), DetectionFile(path, None) as file:
        file.add(FilePrediction(Path("ä.jpg"), problem='"broken"'))
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == [{"file_name": "ä.jpg", "problem": '"broken"'}]


def test_class_numbers_where_there_are_no_names(tmp_path):
    found = Instances((30, 40), scores=torch.tensor([0.123456]), pred_classes=torch.tensor([7]))
    found.pred_boxes = Boxes(torch.tensor([[1.0, 2.0, 3.456, 4.0]]))
    with DetectionFile(tmp_path / "found.json", None) as file:
        file.add(FilePrediction(Path("a.jpg"), found))
    assert json.loads((tmp_path / "found.json").read_text()) == [
        {
            "file_name": "a.jpg",
            "height": 30,
            "width": 40,
            "detections": [{"class": 7, "score": 0.12346, "box": [1.0, 2.0, 3.46, 4.0]}],
        }
    ]
