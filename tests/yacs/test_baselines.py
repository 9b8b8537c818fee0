"""YAML configs of the models to compare with, by ``MODEL.DETR.DETECTOR``."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import build_model
from omegaconf import OmegaConf

from lite_detr import model_zoo
from lite_detr.errors import ConfigError
from lite_detr.yacs.model import lazy_model

NAMES = [name for name in model_zoo.list_configs() if name.startswith("baselines/")]
# One of each meta-architecture.
SAMPLE = {model_zoo.get_config(name).model._target_: name for name in NAMES}


def yaml_config(name, backbone=None):
    cfg = model_zoo.get_yaml_config("deformable_detr/deformable_detr_r50_two_stage_50ep.yaml")
    cfg.MODEL.META_ARCHITECTURE = model_zoo.get_config(name).model._target_.__name__
    cfg.MODEL.DETR.DETECTOR = name
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    if backbone:
        cfg.MODEL.BACKBONE.NAME = str(backbone)
    return cfg


@pytest.mark.parametrize("name", NAMES)
def test_all_but_the_backbone_is_the_lazy_configs(name):
    lazy = model_zoo.get_config(name).model
    found, expected = (
        OmegaConf.to_container(model, resolve=True)
        for model in (lazy_model(yaml_config(name), lazy._target_), lazy)
    )
    # Detectron2's TEST.DETECTIONS_PER_IMAGE says how many.
    for model in (found, expected):
        del model["backbone"], model["detections_per_image"]
    assert found == expected


@pytest.fixture(scope="module")
def small_backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "small.py"
    path.write_text(
        "from detectron2.config import LazyCall as L\n"
        "from small_detectors import TinyBackbone\n"
        "backbone = L(TinyBackbone)()\n"
    )
    return path


@torch.no_grad()
@pytest.mark.parametrize("name", SAMPLE.values())
def test_it_is_built_and_predicts(name, small_backbone):
    cfg = yaml_config(name, small_backbone)
    cfg.MODEL.DETR.NUM_CLASSES, cfg.MODEL.DETR.NUM_QUERIES = 3, 8
    model = build_model(cfg).eval()
    inputs = [{"image": torch.rand(3, 64, 96) * 255}]
    # Anchor DETR has three for each point.
    assert model.forward_queries(inputs)["pred_logits"].shape[1] in (8, 24)
    instances = model(inputs)[0]["instances"]
    assert len(instances) and instances.pred_classes.max() < 3


def test_dc5_is_a_backbone_in_a_file(tmp_path):
    """As docs/detectron2.md says."""
    name = "baselines/detr_dc5_r50_500ep.py"
    path = tmp_path / "dc5.py"
    path.write_text(
        "from lite_detr import model_zoo\n"
        f"backbone = model_zoo.get_config({name!r}).model.backbone\n"
    )
    image = torch.zeros(1, 3, 64, 64)
    found, expected = (
        backbone(image)["res5"].shape
        for backbone in (
            build_model(yaml_config(name, path)).backbone,
            instantiate(model_zoo.get_config(name).model.backbone),
        )
    )
    assert found == expected == (1, 2048, 4, 4)


@pytest.mark.parametrize(
    "name, option, value, message",
    [
        ("detr_r50_500ep", "ENCODER", "full", "ENCODER is for detectors of several scales"),
        ("dab_detr_dc5_r50_50ep", "NUM_LEVELS", 3, "NUM_LEVELS is for detectors of several scales"),
        ("sparse_detr_r50_rho03_50ep", "ENCODER", "H3L1-(2+1)x3", "has a SparseEncoder: omit it"),
    ],
)
def test_options_that_a_detector_has_no_place_for_are_refused(name, option, value, message):
    cfg = yaml_config(f"baselines/{name}.py")
    cfg.MODEL.DETR[option] = value
    with pytest.raises(ConfigError, match=message):
        build_model(cfg)
