"""The JSON file of detections."""

import json

import pytest
import torch
from detectron2.structures import Boxes, Instances

from lite_detr.inference.detection_file import DetectionFile


def test_what_a_run_writes_that_fails_or_finds_nothing_can_be_read(tmp_path):
    path = tmp_path / "found.json"
    with DetectionFile(path, None):
        pass
    assert json.loads(path.read_text()) == []
    with pytest.raises(KeyboardInterrupt), DetectionFile(path, None) as file:
        file.add_problem("ä.jpg", '"broken"')
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == [{"file_name": "ä.jpg", "problem": '"broken"'}]


def test_class_numbers_where_there_are_no_names_and_where_a_frame_is(tmp_path):
    found = Instances((30, 40), scores=torch.tensor([0.123456]), pred_classes=torch.tensor([7]))
    found.pred_boxes = Boxes(torch.tensor([[1.0, 2.0, 3.456, 4.0]]))
    with DetectionFile(tmp_path / "found.json", None) as file:
        file.add("a.jpg", found)
        file.add("a.mp4", found, frame=3, time=0.12)
    image, frame = json.loads((tmp_path / "found.json").read_text())
    assert image == {
        "file_name": "a.jpg",
        "height": 30,
        "width": 40,
        "detections": [{"class": 7, "score": 0.12346, "box": [1.0, 2.0, 3.46, 4.0]}],
    }
    assert frame == image | {"file_name": "a.mp4", "frame": 3, "time": 0.12}
