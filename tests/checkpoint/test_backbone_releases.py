"""The ``init_checkpoint`` of the backbones' files: releases under these names begin a training."""

import pytest
import torch
import torchvision
from detectron2.config import LazyConfig, instantiate

from lite_detr import model_zoo
from lite_detr.checkpoint import DetrCheckpointer

BASE = "deformable_detr/deformable_detr_r50_two_stage_50ep.py"
CLASSIFIER = {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}


def read(name, field):
    path = model_zoo.get_config_file(f"common/backbones/{name}.py")
    return LazyConfig.load(path, field)


def build(name):
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
    model = build(name)
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
    model = build("resnet18")
    weights = torchvision.models.resnet18().state_dict()
    path = tmp_path / read("resnet18", "init_checkpoint").rsplit("/", 1)[-1]
    torch.save(weights, path)
    DetrCheckpointer(model, fine_tune=True).load(str(path))
    assert torch.equal(model.backbone.res5[1].conv2.weight, weights["layer4.1.conv2.weight"])


@pytest.mark.parametrize("depth", [18, 101])
def test_the_file_of_torchvision_is_of_this_depth(depth):
    assert f"resnet{depth}-" in read(f"resnet{depth}", "init_checkpoint")
    assert read(f"resnet{depth}", "backbone").stages.depth == depth
