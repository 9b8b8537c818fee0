import pytest
import torch
from detectron2.structures import Boxes, Instances
from programs import CONFIGS

from lite_detr import model_zoo


@pytest.fixture
def tiny():
    """The YAML config of a detector that is small enough for tests."""
    cfg = model_zoo.get_yaml_config(str(CONFIGS / "tiny.yaml"))
    cfg.MODEL.DETR.DETECTOR = str(CONFIGS / "tiny.py")
    return cfg


@pytest.fixture
def lazy_tiny():
    """The lazy config of the same detector."""
    config = model_zoo.get_config(str(CONFIGS / "tiny.py"))
    config.model.num_classes = 10
    return config


@pytest.fixture
def batch():
    """Two images of different sizes with an object each."""
    inputs = []
    for height, width in ((64, 96), (80, 64)):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 56.0]]))
        instances.gt_classes = torch.tensor([7])
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances})
    return inputs
