"""Narrow images in 16 bits on a CPU: PyTorch's convolutions with AMX would return garbage."""

import pytest
import torch
from detectron2.config import instantiate
from small_detectors import small_config
from torch import nn

from lite_detr import optimize_for_inference
from lite_detr.modeling.neck import extract_maps

DTYPE = torch.bfloat16


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = small_config("dino")
    # As many channels as a real backbone has, of which PyTorch takes several at a time.
    config.backbone.channels = (6, 8, 576)
    return instantiate(config).eval()


def soil_memory():
    """Leave large values in the memory that the next tensors get."""
    for size in (50_000, 200_000, 400_000):
        torch.full((size,), 1e37).to(DTYPE)


def autocast(model, images):
    with torch.autocast("cpu", DTYPE):
        return extract_maps(model.backbone, model.neck, images)


def cast(model, images):
    fast = optimize_for_inference(model, dtype=DTYPE)
    return extract_maps(fast.backbone, fast.neck, images.to(DTYPE))


@pytest.mark.parametrize("run", [autocast, cast])
@pytest.mark.parametrize("size", [(96, 64), (64, 33), (160, 40), (300, 127), (640, 8)])
@torch.no_grad()
def test_maps_are_those_of_float32(model, run, size):
    images = torch.randn(2, 3, *size)
    expected = extract_maps(model.backbone, model.neck, images)
    soil_memory()
    for found, exact in zip(run(model, images), expected):
        assert (found.float() - exact).abs().max() < 0.1


@pytest.mark.parametrize(("width", "dtype"), [(127, torch.float32), (128, DTYPE)])
@torch.no_grad()
def test_only_narrow_images_are_computed_in_float32(model, width, dtype):
    """Two columns of the coarsest scale, of stride 64, are wide enough."""
    fast = optimize_for_inference(model, dtype=DTYPE)
    seen = set()
    for module in [*fast.backbone.modules(), *fast.neck.modules()]:
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(
                lambda conv, args: seen.add((args[0].dtype, conv.weight.dtype))
            )
    maps = extract_maps(fast.backbone, fast.neck, torch.randn(1, 3, 64, width).to(DTYPE))
    assert seen == {(dtype, dtype)}
    assert {feature_map.dtype for feature_map in maps} == {DTYPE}
    assert {parameter.dtype for parameter in fast.neck.parameters()} == {DTYPE}


def test_gradients_are_those_of_float32(model):
    images = torch.randn(2, 3, 96, 48)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", DTYPE, enabled=enabled):
            maps = extract_maps(model.backbone, model.neck, images)
        soil_memory()
        sum((feature_map.float() ** 3).sum() for feature_map in maps).backward()
        gradients.append([p.grad for p in (*model.backbone.parameters(), *model.neck.parameters())])
    for exact, found in zip(*gradients):
        torch.testing.assert_close(found, exact)
