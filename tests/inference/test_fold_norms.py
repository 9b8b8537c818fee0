"""Batch norms as parts of convolutions."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from lite_detr import model_zoo
from lite_detr.inference import OptimizationError
from lite_detr.inference.fold_norms import Norm, fold_norms

IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Chain(nn.Module):
    """Parts one after the other; the output is a named map, as a backbone gives it."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        randomize(self)
        self.eval()

    def forward(self):
        x = IMAGE
        for part in self.parts:
            x = part(x)
        return {"res2": x}


class Residual(nn.Module):
    """The output of the convolution has a use besides its norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.conv(x)
        return x + self.norm(x)


def randomize(module):
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, Norm):
            for name in ("weight", "bias", "running_mean", "running_var"):
                values = getattr(part, name, None)
                if values is not None:
                    values.data.copy_(0.5 + torch.rand(values.shape, generator=generator))


def norms(module):
    return [part for part in module.modules() if isinstance(part, Norm)]


def check(module, folded, left=0, run=None):
    run = run or module
    with torch.no_grad():
        expected = run()
    assert fold_norms(module, run) == folded
    assert len(norms(module)) == left
    with torch.no_grad():
        found = run()
    for name, feature_map in expected.items():
        assert torch.allclose(found[name], feature_map, atol=1e-4 * feature_map.abs().max())


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        FrozenBatchNorm2d(4),
        TorchvisionFrozenBatchNorm2d(4),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_each_kind_of_norm(norm, bias):
    check(Chain(nn.Conv2d(3, 4, 3, bias=bias), norm, nn.ReLU()), folded=1)


def test_detectron2_convolutions_call_their_own():
    check(Chain(Conv2d(3, 4, 3, norm=FrozenBatchNorm2d(4), activation=torch.relu)), folded=1)


def test_groups_and_strides():
    check(Chain(nn.Conv2d(3, 6, 3, stride=2, groups=3), nn.BatchNorm2d(6)), folded=1)


def test_what_cannot_be_folded_is_left():
    no_statistics = nn.BatchNorm2d(4, track_running_stats=False)
    check(Chain(nn.Conv2d(3, 4, 1), no_statistics), folded=0, left=1)
    check(Chain(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), folded=0, left=1)
    twice = nn.Conv2d(3, 3, 1)
    check(Chain(twice, nn.BatchNorm2d(3), twice, nn.BatchNorm2d(3)), folded=0, left=2)


def test_another_use_of_the_output_is_found_out():
    with pytest.raises(OptimizationError, match=r"gives another map res2 .* cannot be optimized"):
        module = Chain(Residual())
        fold_norms(module, module)


@pytest.mark.parametrize(
    ("backbone", "folded"), [("resnet18", 20), ("efficientnet_lite0", 48), ("resnet50d", 55)]
)
def test_backbones(backbone, folded):
    config = model_zoo.get_lazy_config_file(f"common/backbones/{backbone}.py")
    module = instantiate(LazyConfig.load(config).backbone).eval()
    randomize(module)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    check(module, folded, run=lambda: module(image))
