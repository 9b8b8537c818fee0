"""Exported programs: TorchScript by Detectron2's exporter, and padding to the same size."""

from functools import partial
from importlib import import_module

import pytest
import torch
from small_detectors import CONFIGS, small_detector

from lite_detr import ops
from lite_detr.export import check, export_torchscript
from lite_detr.export.program import traceable_same_padding
from lite_detr.modeling import KeyAwareDeformableAttention, MultiScaleDeformableAttention

timm_layers = pytest.importorskip("timm.layers")


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_convolutions_give_the_same(kernel, stride, dilation):
    torch.manual_seed(0)
    convolution = timm_layers.Conv2dSame(2, 3, kernel, stride=stride, dilation=dilation)
    for height, width in [(12, 17), (13, 16), (14, 15), (7, 5)]:
        image = torch.randn(1, 2, height, width)
        expected = convolution(image)
        with traceable_same_padding(convolution):
            assert torch.equal(convolution(image), expected)
        assert expected.shape[2:] == (-(-height // stride), -(-width // stride))


def test_sizes_stay_simple_formulas():
    convolutions = torch.nn.Sequential(*(timm_layers.Conv2dSame(1, 1, 3, stride=2) for _ in "abcd"))
    free = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    with traceable_same_padding(convolutions):
        program = torch.export.export(
            convolutions, (torch.zeros(1, 1, 50, 70),), dynamic_shapes=free
        )
    (output,) = next(node for node in program.graph.nodes if node.op == "output").args[0]
    assert "Max" not in str(output.meta["val"].shape) and len(str(output.meta["val"].shape[2])) < 60


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("name", CONFIGS)
def test_traced_once_it_takes_images_of_any_size(name, tmp_path, monkeypatch):
    detector = small_detector(name).float()
    path = tmp_path / "detector.ts"
    export_torchscript(detector, path)
    # A traced program computes locations and weights before it samples, which rounds otherwise.
    for attention, operator in (
        (MultiScaleDeformableAttention, "ms_deform_attn"),
        (KeyAwareDeformableAttention, "key_aware_ms_deform_attn"),
    ):
        in_steps = import_module(f"lite_detr.ops.{operator}")._in_steps
        in_steps = staticmethod(partial(in_steps, getattr(ops, operator)))
        monkeypatch.setattr(attention, "operator", in_steps)
    run, expected = check.run_torchscript(path), check.run_detector_one_by_one(detector)
    batches = list(check.sample_batches(detector))
    assert len({images.shape[2:] for images, _ in batches}) == 3
    assert max(check.check_batches(run, expected, batches)) < 1e-6


def test_padding_is_masked_though_the_traced_image_has_none(tmp_path, monkeypatch):
    detector = small_detector("deformable_detr").float()
    constraints = {"size_divisibility": 32}
    monkeypatch.setattr(type(detector.backbone), "padding_constraints", constraints)
    path = tmp_path / "detector.ts"
    export_torchscript(detector, path)
    image = torch.rand(1, 3, 70, 101) * 255
    batch = [(image, torch.tensor([[70, 101]]))]
    run, expected = check.run_torchscript(path), check.run_detector_one_by_one(detector)
    assert max(check.check_batches(run, expected, batch)) < 1e-6
