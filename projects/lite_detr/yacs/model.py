"""Turn a YAML config into the arguments of a detector, starting from a lazy config."""

import logging
import pydoc
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.config import LazyCall as L
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_backbone
from omegaconf import DictConfig

from .. import model_zoo
from ..data.coco import check_for_detection
from ..errors import ConfigError
from ..modeling import (
    DeformableEncoder,
    InterleavedEncoder,
    KeyAwareDeformableAttention,
    MultiScaleDeformableAttention,
)
from ..modeling.interleaved_encoder import parse_notation

logger = logging.getLogger("lite_detr")

ATTENTIONS = {
    "deformable": MultiScaleDeformableAttention,
    "key_aware": KeyAwareDeformableAttention,
}
# Options of Detectron2 that a detector of boxes cannot follow.
REFUSED = (
    ("MODEL.MASK_ON", "predict masks"),
    ("MODEL.KEYPOINT_ON", "predict keypoints"),
    ("MODEL.LOAD_PROPOSALS", "take proposals from files"),
)


def detector_arguments(detector: type, cfg: CfgNode) -> dict[str, Any]:
    """Return the arguments of a meta-architecture that a YAML config stands for.

    Args:
        detector: the meta-architecture, whose lazy config ``cfg`` starts from.
        cfg: Detectron2's config with the keys of :func:`add_lite_detr_config`.

    Raises:
        ConfigError: an option contradicts another, or asks for what the detector cannot do.
    """
    share_log_handlers()
    model = lazy_model(cfg, detector)
    use_available_device(cfg)
    parts = {"backbone": backbone_from_config(cfg)}
    return parts | {
        name: instantiate(model[name]) for name in model if name not in ("_target_", "backbone")
    }


def use_available_device(cfg: CfgNode) -> None:
    """Change ``MODEL.DEVICE``, which Detectron2 reads next, to the CPU if there is no GPU."""
    if not cfg.MODEL.DEVICE.startswith("cuda") or torch.cuda.is_available():
        return
    logger.warning(
        "MODEL.DEVICE is %s, and PyTorch finds no GPU: the detector runs on the CPU",
        cfg.MODEL.DEVICE,
    )
    is_frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    if is_frozen:
        cfg.freeze()


def share_log_handlers() -> None:
    """Log where Detectron2 logs, whose programs set up its own logger alone.

    Does nothing if our logger, or the root logger, has handlers already.
    """
    if not logger.hasHandlers():
        theirs = logging.getLogger("detectron2")
        logger.setLevel(theirs.level)
        for handler in theirs.handlers:
            logger.addHandler(handler)


def lazy_model(cfg: CfgNode, detector: type) -> DictConfig:
    """Return the lazy config of a detector with the changes in ``cfg``, except for the backbone."""
    if "DETR" not in cfg.MODEL:
        raise ConfigError(
            "the config has no MODEL.DETR: call lite_detr.add_lite_detr_config(cfg) before merging "
            "files into it"
        )
    refuse_other_tasks(cfg)
    options = cfg.MODEL.DETR
    refuse_unknown_keys(options)
    path = options.DETECTOR or detector.lazy_config
    model = model_zoo.get_config(path).model
    check_target(model, path, detector)
    refuse_for_one_scale(options, model, path)
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
    """Raise a ConfigError if a config asks for more than boxes."""
    for path, what in REFUSED:
        value = cfg
        for key in path.split("."):
            value = value[key]
        if value:
            raise ConfigError(
                f"{cfg.MODEL.META_ARCHITECTURE} detects boxes and cannot {what}: set {path} to "
                "False"
            )
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        check_for_detection(name)


def refuse_unknown_keys(options: CfgNode) -> None:
    """Raise a ConfigError for a misspelt key, which yacs accepts as a new one in Python."""
    fresh = get_cfg()
    model_zoo.add_lite_detr_config(fresh)
    known = fresh.MODEL.DETR
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ConfigError(f"MODEL.DETR has no {', '.join(unknown)}; it has {', '.join(known)}")


def check_target(model: DictConfig, path: str, detector: type) -> None:
    """Raise a ConfigError if a lazy model is another meta-architecture than the one to build."""
    built = target_of(model)
    if not issubclass(detector, built):
        raise ConfigError(
            f"MODEL.DETR.DETECTOR {path!r} is a {built.__name__}, MODEL.META_ARCHITECTURE says "
            f"{detector.__name__}: make them agree, or omit MODEL.DETR.DETECTOR"
        )


def target_of(node: DictConfig) -> type:
    """Return the class that a lazy node builds."""
    return pydoc.locate(node._target_) if isinstance(node._target_, str) else node._target_


def refuse_for_one_scale(options: CfgNode, model: DictConfig, path: str) -> None:
    """Raise a ConfigError if an option is for detectors of several scales, and this has one."""
    if model.num_levels > 1:
        return
    for key in ("ENCODER", "ATTENTION", "NUM_LEVELS"):
        if options[key]:
            raise ConfigError(
                f"MODEL.DETR.{key} is for detectors of several scales, and MODEL.DETR.DETECTOR "
                f"{path!r} has one: omit it"
            )


def set_encoder(model: DictConfig, encoder: str, num_levels: int | None) -> None:
    """Give a lazy model the encoder that ``MODEL.DETR.ENCODER`` names.

    Args:
        model: a detector's lazy config.
        encoder: ``full``, or an interleaved one in the paper's notation, see
            :func:`parse_notation`.
        num_levels: the number of scales, if another option sets it.

    Raises:
        ConfigError: the name is neither, or contradicts ``num_levels``, or the detector's own
            encoder is neither.
    """
    if not issubclass(target_of(model.encoder), (DeformableEncoder, InterleavedEncoder)):
        raise ConfigError(
            f"MODEL.DETR.ENCODER replaces a full or an interleaved encoder, and the detector has a "
            f"{target_of(model.encoder).__name__}: omit it"
        )
    prototype = model.encoder.layer
    if encoder == "full":
        if "num_blocks" in model.encoder:
            num_layers = model.encoder.num_blocks * model.encoder.updates_per_block
            model.encoder = L(DeformableEncoder)(layer=prototype, num_layers=num_layers)
        return
    try:
        model.num_levels, options = parse_notation(encoder)
    except ConfigError as error:
        raise ConfigError(f"MODEL.DETR.ENCODER: {error}. The full encoder is 'full'") from None
    if num_levels not in (None, model.num_levels):
        raise ConfigError(
            f"MODEL.DETR.ENCODER {encoder!r} has {model.num_levels} scales, "
            f"MODEL.DETR.NUM_LEVELS says {num_levels}: omit it, or make them agree"
        )
    model.encoder = L(InterleavedEncoder)(layer=prototype, **options)


def set_attention(model: DictConfig, attention: str) -> None:
    """Give the encoder and the decoder of a lazy model one of :data:`ATTENTIONS`."""
    if attention not in ATTENTIONS:
        raise ConfigError(
            f"MODEL.DETR.ATTENTION is {attention!r}; accepted are {', '.join(ATTENTIONS)}"
        )
    node = model.encoder.layer.attention
    node._target_ = ATTENTIONS[attention]
    if attention == "deformable":
        node.pop("key_proj", None)


def backbone_from_config(cfg: CfgNode) -> Backbone:
    """Build a backbone that is registered with Detectron2 or described by a lazy config.

    Args:
        cfg: ``MODEL.BACKBONE.NAME`` is a registered name such as ``build_resnet_backbone`` or
            ``TimmBackbone``; one of ``configs/common/backbones`` such as ``swin_tiny``; or a file
            with a lazy ``backbone``. Registered ones read their options from the config.

    Raises:
        ConfigError: there is no such backbone, and the message lists those that exist; or the file
            has no ``backbone``.
    """
    name = cfg.MODEL.BACKBONE.NAME
    if name in BACKBONE_REGISTRY:
        return build_backbone(cfg)
    lazy = model_zoo.list_backbones()
    path = f"{model_zoo.BACKBONES}/{name}.py" if name in lazy else name
    if not path.endswith(".py"):
        registered = sorted(name for name, _ in BACKBONE_REGISTRY)
        raise ConfigError(
            f"MODEL.BACKBONE.NAME is {name!r}; registered are {', '.join(registered)}; lazy ones "
            f"are {', '.join(lazy)}; a file NAME.py with a lazy `backbone` is also accepted"
        )
    fields = model_zoo.get_fields(path, "backbone", "pixel_mean", "pixel_std", "input_format")
    if "backbone" not in fields:
        raise ConfigError(
            f"MODEL.BACKBONE.NAME is {name!r}, a file without `backbone`: assign a LazyCall of a "
            "Backbone to it, as the files in configs/common/backbones do"
        )
    _compare_pixels(cfg, fields)
    return instantiate(fields["backbone"])


def _compare_pixels(cfg: CfgNode, fields: Mapping[str, Any]) -> None:
    """Warn if images are normalised differently than for the backbone's weights."""
    for option, field, given in (
        ("MODEL.PIXEL_MEAN", "pixel_mean", list(cfg.MODEL.PIXEL_MEAN)),
        ("MODEL.PIXEL_STD", "pixel_std", list(cfg.MODEL.PIXEL_STD)),
        ("INPUT.FORMAT", "input_format", cfg.INPUT.FORMAT),
    ):
        expected = fields.get(field, given)
        if expected != given:
            logger.warning(
                "%s is %s, the weights of backbone %s were trained with %s",
                option,
                given,
                cfg.MODEL.BACKBONE.NAME,
                expected,
            )
