"""Backbone weights by themselves: from torchvision, timm, Detectron2 and the authors of Swin."""

import pickle

import pytest
import torch
import torchvision
from detectron2.config import LazyConfig, instantiate

from lite_detr import model_zoo
from lite_detr.checkpoint import DetrCheckpointer, WeightsError, convert, convert_weights

R50 = "deformable_detr/deformable_detr_r50_two_stage_50ep.py"
SWIN = "h_detr/h_detr_swin_t_36ep.py"

pytestmark = [
    # Of Detectron2's Swin.
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:Importing from timm.models.layers:FutureWarning"),
]


def build(name):
    torch.manual_seed(1)
    return instantiate(model_zoo.get_config(name).model)


@pytest.fixture(scope="module")
def resnet():
    """torchvision's, with statistics that are not those of the beginning."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    return model.eval()


def resnet_maps(model, images):
    images = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    maps = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        images = layer(images)
        maps.append(images)
    return maps[1:]


@torch.no_grad()
def assert_same_resnet(model, resnet):
    images = torch.rand(1, 3, 64, 96)
    ours = model.backbone(images)
    for name, expected in zip(("res3", "res4", "res5"), resnet_maps(resnet, images), strict=True):
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-4)


def test_torchvisions_resnet(resnet):
    model = build(R50)
    conversion = convert_weights(resnet.state_dict(), model)
    assert all(name.startswith("backbone.") for name in conversion.state_dict)
    assert {"fc.weight", "bn1.num_batches_tracked"} <= set(conversion.ignored)
    incompatible = model.load_state_dict(conversion.state_dict, strict=False)
    assert not any(name.startswith("backbone.") for name in incompatible.missing_keys)
    assert_same_resnet(model, resnet)


@pytest.mark.parametrize("prefix", ["", "backbone.bottom_up."])
def test_detectron2s_resnet(resnet, prefix, tmp_path):
    """As its model zoo has it: a pickle of arrays, for matching by heuristics."""
    backbone = {
        name.removeprefix("backbone."): value
        for name, value in convert(resnet.state_dict(), build(R50)).items()
    }
    arrays = {prefix + name: value.numpy() for name, value in backbone.items()}
    arrays |= {"stem.fc.weight": torch.zeros(10, 4).numpy()} if not prefix else {}
    arrays |= {"roi_heads.box_head.fc1.weight": torch.zeros(2).numpy()} if prefix else {}
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content))
    model = build(R50)
    before = model.neck.lateral_convs[0][0].weight.clone()
    DetrCheckpointer(model, fine_tune=True).load(str(tmp_path / "R-50.pkl"))
    assert_same_resnet(model, resnet)
    assert torch.equal(model.neck.lateral_convs[0][0].weight, before)


def test_caffe2s_names_are_left_to_detectron2(resnet, tmp_path):
    weight = torch.randn(64, 3, 7, 7)
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": {"conv1_w": weight.numpy()}}))
    model = build(R50)
    DetrCheckpointer(model, fine_tune=True).load(str(tmp_path / "R-50.pkl"))
    assert torch.equal(model.backbone.stem.conv1.weight, weight)


def swin_release(backbone):
    """The names of the Swin authors' classifier: no norm behind the stages but the last."""
    weights = {
        name: torch.randn_like(value) if value.is_floating_point() else value
        for name, value in backbone.state_dict().items()
        if not name.startswith(("norm1", "norm2", "norm3"))
    }
    weights["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    weights |= {"norm.weight": torch.ones(768), "norm.bias": torch.zeros(768)}
    return weights | {"head.weight": torch.zeros(1000, 768), "head.bias": torch.zeros(1000)}


def test_swin_of_its_authors(tmp_path):
    pytest.importorskip("timm")
    model = build(SWIN)
    release = swin_release(model.backbone)
    torch.save({"model": release}, tmp_path / "swin.pth")
    conversion = convert_weights(release, model)
    assert set(conversion.ignored) == {
        "norm.weight", "norm.bias", "head.weight", "head.bias", "layers.0.blocks.1.attn_mask"
    }  # fmt: skip
    assert set(conversion.own) == {
        f"backbone.norm{stage}.{leaf}" for stage in (1, 2, 3) for leaf in ("weight", "bias")
    }
    before = model.queries.encode_box.norm.weight.clone()
    DetrCheckpointer(model, fine_tune=True).load(str(tmp_path / "swin.pth"))
    loaded = model.backbone.state_dict()
    assert all(torch.equal(loaded[name], release[name]) for name in release if name in loaded)
    assert torch.equal(model.queries.encode_box.norm.weight, before)


def test_a_backbone_of_another_kind_is_an_error(resnet):
    pytest.importorskip("timm")
    with pytest.raises(WeightsError, match="torchvision's ResNet do not fit the model"):
        convert(resnet.state_dict(), build(SWIN))


def test_a_backbone_alone_is_no_detector(resnet, tmp_path):
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(WeightsError, match="hold no detector"):
        DetrCheckpointer(build(R50)).load(str(tmp_path / "resnet.pth"))


def test_weights_of_which_nothing_fits_start_no_training(tmp_path):
    torch.save({"model": {"encoder.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    checkpointer = DetrCheckpointer(build(R50), fine_tune=True)
    with pytest.raises(WeightsError, match="other.pth hold nothing of the model.*encoder.weight"):
        checkpointer.load(str(tmp_path / "other.pth"))


def test_a_resnet_within_a_pyramid(resnet):
    """Detectron2's FPN holds it as its bottom-up part; its own convolutions are re-initialised."""
    config = model_zoo.get_config(R50)
    config.model.backbone = model_zoo.get_config("common/backbones/resnet50_fpn.py").backbone
    torch.manual_seed(1)
    model = instantiate(config.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(convert(resnet.state_dict(), model), strict=False)
    for name, value in model.state_dict().items():
        if not name.startswith("backbone.bottom_up."):
            assert torch.equal(value, before[name]), name
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        ours = model.backbone.bottom_up(images)
        for name, expected in zip(("res3", "res4", "res5"), resnet_maps(resnet, images)):
            torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-4)


BASE = "deformable_detr/deformable_detr_r50_two_stage_50ep.py"
CLASSIFIER = {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}


def read(name, field):
    path = model_zoo.get_config_file(f"common/backbones/{name}.py")
    return LazyConfig.load(path, field)


def build_small(name):
    config = model_zoo.get_config(BASE).model
    config.backbone = read(name, "backbone")
    torch.manual_seed(0)
    return instantiate(config)


def released(backbone, left_out):
    """Weights under a backbone's own names, without what only a detector's backbone has."""
    return {
        name: torch.randn_like(value)
        for name, value in backbone.state_dict().items()
        if not any(part in name for part in left_out)
    }


@pytest.mark.parametrize(
    "name, part, left_out",
    [
        ("regnetx_4gf", "", []),
        ("mvitv2_tiny", "", ["scale"]),
        # MAE has no relative positions.
        ("vit_base_sfp", "net", ["rel_pos"]),
    ],
)
def test_a_release_begins_a_training(name, part, left_out, tmp_path):
    """Also with the norm and the classifier that the backbone was trained in."""
    if name != "regnetx_4gf":
        pytest.importorskip("timm")
    model = build_small(name)
    release = released(model.backbone.get_submodule(part), left_out)
    width = 768
    others = CLASSIFIER | {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    file, _, query = read(name, "init_checkpoint").partition("?")
    path = tmp_path / file.rsplit("/", 1)[-1]
    pycls = path.suffix == ".pyth"
    torch.save({"model_state" if pycls else "model": release | others}, path)
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("backbone.")}

    DetrCheckpointer(model, fine_tune=True).load(f"{path}?{query}" if query else str(path))
    loaded = model.backbone.get_submodule(part).state_dict()
    assert len(release) > 100
    for weight, value in release.items():
        if "num_batches_tracked" not in weight:
            assert torch.equal(loaded[weight], value), weight
    after = model.state_dict()
    assert all(torch.equal(after[weight], value) for weight, value in before.items())


def test_resnet18_begins_with_torchvisions_own_file(tmp_path):
    model = build_small("resnet18")
    weights = torchvision.models.resnet18().state_dict()
    path = tmp_path / read("resnet18", "init_checkpoint").rsplit("/", 1)[-1]
    torch.save(weights, path)
    DetrCheckpointer(model, fine_tune=True).load(str(path))
    assert torch.equal(model.backbone.res5[1].conv2.weight, weights["layer4.1.conv2.weight"])


@pytest.mark.parametrize("depth", [18, 101])
def test_the_file_of_torchvision_is_of_this_depth(depth):
    assert f"resnet{depth}-" in read(f"resnet{depth}", "init_checkpoint")
    assert read(f"resnet{depth}", "backbone").stages.depth == depth
