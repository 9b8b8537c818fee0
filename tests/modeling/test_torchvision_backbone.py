"""TorchvisionBackbone."""

import copy
from urllib.error import URLError

import pytest
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torchvision.ops import StochasticDepth

from lite_detr.errors import DownloadError, WeightsError
from lite_detr.modeling import TorchvisionBackbone
from lite_detr.modeling.backbone.torchvision_backbone import find_stages
from lite_detr.modeling.detector import evaluating

IMAGES = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def test_maps_are_named_by_stride_and_have_the_stated_shapes():
    backbone = TorchvisionBackbone("mobilenet_v3_small").eval()
    assert backbone.output_shape() == {
        "stride8": ShapeSpec(channels=24, stride=8),
        "stride16": ShapeSpec(channels=48, stride=16),
        "stride32": ShapeSpec(channels=576, stride=32),
    }
    assert {name: tuple(feature.shape) for name, feature in backbone(IMAGES).items()} == {
        "stride8": (1, 24, 8, 12),
        "stride16": (1, 48, 4, 6),
        "stride32": (1, 576, 2, 3),
    }


@pytest.mark.parametrize(
    "model, stages",
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        # Not the wider layers within the first block of the next stage.
        ("mobilenet_v3_small", ["features.1", "features.3", "features.8", "features"]),
        # Not the normalisation that belongs to the next reduction.
        ("convnext_tiny", ["features.1", "features.3", "features.5", "features"]),
        ("regnet_x_400mf", [f"trunk_output.block{i}" for i in (1, 2, 3)] + ["trunk_output"]),
        # Its last stage is normalised, and turned as the others are not.
        ("swin_t", ["features.1", "features.3", "features.5", "permute"]),
    ],
)
def test_the_last_stage_of_each_stride_is_found(model, stages):
    model = torchvision.models.get_model(model, weights=None)
    found = find_stages(model, {8, 16, 32}, size_divisibility=0)
    assert [found[stride] for stride in (4, 8, 16, 32)] == stages


def test_maps_are_those_of_the_model():
    """Stages 3 and 5 of a Swin Transformer have their channels last, its normalised end has not."""
    torch.manual_seed(0)
    backbone = TorchvisionBackbone("swin_t").eval()
    torch.manual_seed(0)
    model = torchvision.models.swin_t().eval()
    features = IMAGES
    expected = {}
    for index, stage in enumerate(model.features):
        features = stage(features)
        expected[index] = features.permute(0, 3, 1, 2)
    end = model.permute(model.norm(features))
    for name, feature in zip(("stride8", "stride16", "stride32"), (expected[3], expected[5], end)):
        torch.testing.assert_close(backbone(IMAGES)[name], feature)
        assert feature.shape[1] == backbone.output_shape()[name].channels


def test_maps_of_named_nodes():
    backbone = TorchvisionBackbone(
        "resnet18", out_strides=(8, 16), return_nodes=["layer2.0", "layer3.0.relu"]
    ).eval()
    maps = backbone(IMAGES)
    assert [tuple(maps[name].shape[1:]) for name in ("stride8", "stride16")] == [
        (128, 8, 12),
        (256, 4, 6),
    ]
    assert not hasattr(backbone.body.layer3, "1")


@pytest.mark.parametrize(
    "options, problem",
    [
        (
            {"out_strides": (8, 64)},
            r"resnet18 has no feature map of stride \[64\].*\[.*8, 16, 32.*\]",
        ),
        ({"return_nodes": ["layer2"]}, r"names 1 maps \['layer2'\] for the 3 strides"),
        (
            {"return_nodes": ["layer1", "layer3", "layer4"]},
            r"stride 8 is needed.*\(1, 64, 16, 24\)",
        ),
        ({"weights": "IMAGENET22K"}, "'IMAGENET22K' are not a file.*IMAGENET1K_V1, DEFAULT"),
    ],
)
def test_what_does_not_fit_is_said(options, problem):
    with pytest.raises(ValueError, match=problem):
        TorchvisionBackbone("resnet18", **options)


def test_a_model_that_torchvision_lacks_is_named_with_the_nearest():
    problem = "torchvision has no model 'resnet-18'; did you mean .*resnet18"
    with pytest.raises(ValueError, match=problem):
        TorchvisionBackbone("resnet-18")


def test_a_model_of_one_size_of_image_is_refused():
    with pytest.raises(ValueError, match="image of 64x96 pixels"):
        TorchvisionBackbone("vit_b_16")


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_norms_keep_statistics_and_weights(frozen):
    backbone = TorchvisionBackbone("mobilenet_v3_small", frozen_norm=frozen).train()
    norm = backbone.body.features.get_submodule("0.1")
    before = norm.running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64) + 5)
    assert torch.equal(norm.running_mean, before) == frozen
    assert norm.weight.requires_grad != frozen


def test_frozen_stride_freezes_what_makes_that_map_and_nothing_behind_it():
    backbone = TorchvisionBackbone("resnet18", frozen_norm=False, frozen_stride=4)
    trained = {n.split(".")[0] for n, p in backbone.body.named_parameters() if p.requires_grad}
    frozen = {n.split(".")[0] for n, p in backbone.body.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}
    assert trained == {"layer2", "layer3", "layer4"}
    assert list(backbone(IMAGES)) == ["stride8", "stride16", "stride32"]


def test_nothing_behind_the_coarsest_map_is_kept():
    backbone = TorchvisionBackbone("resnet18", out_strides=(8, 16))
    assert {name.split(".")[0] for name, _ in backbone.body.named_parameters()} == {
        "conv1", "bn1", "layer1", "layer2", "layer3"
    }  # fmt: skip


def test_stochastic_depth_follows_the_mode():
    """Also after the evaluation within a training that does not call ``train``."""
    backbone = TorchvisionBackbone("convnext_tiny")
    for module in backbone.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.5

    def differs():
        torch.manual_seed(0)
        first = backbone(IMAGES)["stride32"]
        return not torch.equal(first, backbone(IMAGES)["stride32"])

    with torch.no_grad():
        assert differs()
        with evaluating(backbone):
            assert not differs()
        assert differs()
        backbone.eval()
        assert not differs()
        backbone.train()
        assert differs()


def test_a_copy_is_whole_and_apart():
    backbone = TorchvisionBackbone("resnet18").train()
    twin = copy.deepcopy(backbone)
    before = backbone(IMAGES)["stride32"]
    torch.testing.assert_close(twin(IMAGES)["stride32"], before)
    with torch.no_grad():
        twin.body.conv1.weight.zero_()
    torch.testing.assert_close(backbone(IMAGES)["stride32"], before)
    assert not twin.train().body.bn1.training


def test_weights_of_a_file_are_those_of_the_whole_model(tmp_path):
    model = torchvision.models.resnet18().eval()
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    backbone = TorchvisionBackbone("resnet18", weights=str(tmp_path / "resnet18.pth"))
    weights = backbone.body.state_dict()
    assert len(weights) > 100
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "squeezenet.pth")
    with pytest.raises(WeightsError, match="squeezenet.pth do not fit resnet18"):
        TorchvisionBackbone("resnet18", weights=str(tmp_path / "squeezenet.pth"))


def test_weights_by_name_are_torchvisions(monkeypatch):
    """Which would download them."""
    asked = []
    get_model = torchvision.models.get_model

    def get(name, weights):
        asked.append(weights)
        return get_model(name, weights=None)

    monkeypatch.setattr(torchvision.models, "get_model", get)
    TorchvisionBackbone("resnet50", weights="DEFAULT")
    assert asked == [torchvision.models.ResNet50_Weights.IMAGENET1K_V2]


def test_weights_that_cannot_be_downloaded_are_one_line(monkeypatch):
    def download(name, weights):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models, "get_model", download)
    with pytest.raises(
        DownloadError, match="weights https://.*resnet50.* no network.*backbone.wei"
    ):
        TorchvisionBackbone("resnet50", weights="DEFAULT")


def test_a_config_of_detectron2_states_the_arguments_in_capitals():
    node = {"MODEL_NAME": "resnet18", "OUT_STRIDES": [8, 16], "WEIGHTS": None, "FROZEN_STRIDE": 4}
    model = {
        "BACKBONE": {"NAME": "TorchvisionBackbone"},
        "PIXEL_MEAN": [0.0, 0.0, 0.0],
        "TORCHVISION": node,
    }
    backbone = build_backbone(CfgNode({"MODEL": model}))
    assert type(backbone) is TorchvisionBackbone
    assert list(backbone.output_shape()) == ["stride8", "stride16"]
    assert not backbone.body.conv1.weight.requires_grad
