"""The backbone that ``MODEL.BACKBONE.NAME`` names."""

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, instantiate
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_backbone

from .. import model_zoo

logger = logging.getLogger("lite_detr")


def backbone_from_config(cfg: CfgNode) -> Backbone:
    """Builds a backbone that is registered with Detectron2 or that a lazy config holds.

    Args:
        cfg: ``MODEL.BACKBONE.NAME`` is a registered name such as ``build_resnet_backbone`` or
            ``TimmBackbone``; or one of ``configs/common/backbones`` such as ``swin_tiny``; or a
            file with a lazy ``backbone``. Registered ones read their options from the config.

    Raises:
        ValueError: there is no such backbone, and the message lists those that there are; or the
            file has no ``backbone``.
    """
    name = cfg.MODEL.BACKBONE.NAME
    if name in BACKBONE_REGISTRY:
        return build_backbone(cfg)
    lazy = model_zoo.list_backbones()
    path = f"{model_zoo.BACKBONES}/{name}.py" if name in lazy else name
    if not path.endswith(".py"):
        registered = sorted(name for name, _ in BACKBONE_REGISTRY)
        raise ValueError(
            f"MODEL.BACKBONE.NAME is {name!r}; registered are {', '.join(registered)}; lazy ones "
            f"are {', '.join(lazy)}; besides, a file NAME.py with a lazy `backbone`"
        )
    fields = model_zoo.get_fields(path, "backbone", "pixel_mean", "pixel_std", "input_format")
    if "backbone" not in fields:
        raise ValueError(
            f"MODEL.BACKBONE.NAME is {name!r}, a file without `backbone`: assign a LazyCall of a "
            "Backbone to it, as the files in configs/common/backbones do"
        )
    _compare_pixels(cfg, fields)
    return instantiate(fields["backbone"])


def _compare_pixels(cfg: CfgNode, fields: Mapping[str, Any]) -> None:
    """Warns of images made otherwise than those that the backbone's weights were trained with."""
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
