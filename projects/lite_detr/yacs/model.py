"""From a YAML config to the arguments of a detector, by way of the lazy configs."""

import pydoc
from typing import Any

from detectron2.config import CfgNode, get_cfg, instantiate
from omegaconf import DictConfig

from .. import model_zoo
from ..data.coco import check_for_detection
from .backbone import backbone_from_config
from .config import add_lite_detr_config
from .encoder import set_attention, set_encoder

# Options of Detectron2 that a detector of boxes cannot follow.
REFUSED = (
    ("MODEL.MASK_ON", "predict masks"),
    ("MODEL.KEYPOINT_ON", "predict keypoints"),
    ("MODEL.LOAD_PROPOSALS", "take proposals from files"),
    ("TEST.AUG.ENABLED", "be tested with augmentation, which Detectron2 has for R-CNNs alone"),
)


def detector_arguments(cfg: CfgNode, detector: type) -> dict[str, Any]:
    """The arguments of a meta-architecture that a YAML config stands for.

    Args:
        cfg: Detectron2's config with the keys of :func:`add_lite_detr_config`.
        detector: the meta-architecture, whose lazy config is where ``cfg`` starts from.

    Raises:
        ValueError: an option contradicts another, or asks for what the detector cannot do.
    """
    model = lazy_model(cfg, detector)
    parts = {"backbone": backbone_from_config(cfg)}
    return parts | {
        name: instantiate(model[name]) for name in model if name not in ("_target_", "backbone")
    }


def lazy_model(cfg: CfgNode, detector: type) -> DictConfig:
    """The lazy config of a detector, changed by what ``cfg`` says of all but the backbone."""
    if "DETR" not in cfg.MODEL:
        raise ValueError(
            "the config has no MODEL.DETR: call lite_detr.add_lite_detr_config(cfg) before files "
            "are merged into it"
        )
    refuse_other_tasks(cfg)
    options = cfg.MODEL.DETR
    refuse_unknown_keys(options)
    path = options.DETECTOR or detector.lazy_config
    model = model_zoo.get_config(path).model
    check_target(model, path, detector)
    for key, node, name in (
        ("NUM_CLASSES", model, "num_classes"),
        ("NUM_QUERIES", model.queries, "num_queries"),
        ("NUM_LEVELS", model, "num_levels"),
        ("IN_FEATURES", model, "in_features"),
        ("SCORE_THRESH_TEST", model, "score_thresh"),
    ):
        if options[key] is not None:
            node[name] = options[key]
    if options.ENCODER:
        set_encoder(model, options.ENCODER, options.NUM_LEVELS)
    if options.ATTENTION:
        set_attention(model, options.ATTENTION)
    model.pixel_mean = list(cfg.MODEL.PIXEL_MEAN)
    model.pixel_std = list(cfg.MODEL.PIXEL_STD)
    model.input_format = cfg.INPUT.FORMAT
    model.detections_per_image = cfg.TEST.DETECTIONS_PER_IMAGE
    if options.DETECTIONS_PER_IMAGE is not None:
        model.detections_per_image = options.DETECTIONS_PER_IMAGE
    return model


def refuse_other_tasks(cfg: CfgNode) -> None:
    """Raises a ValueError where a config asks for more than boxes."""
    for path, what in REFUSED:
        value = cfg
        for key in path.split("."):
            value = value[key]
        if value:
            raise ValueError(
                f"{cfg.MODEL.META_ARCHITECTURE} detects boxes and cannot {what}: set {path} to "
                "False"
            )
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        check_for_detection(name)


def refuse_unknown_keys(options: CfgNode) -> None:
    """Raises a ValueError at a slip of the pen, which yacs takes for a new key in Python."""
    fresh = get_cfg()
    add_lite_detr_config(fresh)
    known = fresh.MODEL.DETR
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(f"MODEL.DETR has no {', '.join(unknown)}; it has {', '.join(known)}")


def check_target(model: DictConfig, path: str, detector: type) -> None:
    """Raises a ValueError where a lazy model is another meta-architecture than the one to build."""
    target = model._target_
    built = pydoc.locate(target) if isinstance(target, str) else target
    if not issubclass(detector, built):
        raise ValueError(
            f"MODEL.DETR.DETECTOR {path!r} is a {built.__name__}, MODEL.META_ARCHITECTURE says "
            f"{detector.__name__}: make them agree, or leave out MODEL.DETR.DETECTOR"
        )
