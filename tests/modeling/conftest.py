import pytest
import small_detectors
import torch
from detectron2.config import instantiate
from small_detectors import small_config

from lite_detr.modeling import Scales


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def make_detector():
    """``make_detector(name, encoder, attention, **options)``: a model without dropout."""

    def make(name="two_stage", encoder="full", attention="msda", **options):
        return instantiate(small_config(name, encoder, attention, **options))

    return make


@pytest.fixture
def make_scales():
    """``make_scales(shapes, valid)``, where valid has each image's (height, width) per scale."""

    def make(shapes, valid=None, batch=1, dtype=torch.float64):
        valid = valid or [shapes] * batch
        masks = []
        for level, shape in enumerate(shapes):
            mask = torch.ones(len(valid), *shape, dtype=torch.bool)
            for image, sizes in enumerate(valid):
                height, width = sizes[level]
                mask[image, :height, :width] = False
            masks.append(mask)
        return Scales.from_masks(masks, any(bool(mask.any()) for mask in masks), dtype)

    return make


@pytest.fixture
def perturb():
    """Moves every parameter off its initial value, where many gradients and offsets are zero."""

    def move(module, std=0.1):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += std * torch.randn_like(parameter)
        return module

    return move


@pytest.fixture
def make_input():
    """``make_input(height, width, objects)``: an input with some boxes, of classes 0 to 4."""
    return small_detectors.make_input
