"""The backbone that ``MODEL.BACKBONE.NAME`` names."""

import logging
from pathlib import Path

from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_backbone

from .. import model_zoo

logger = logging.getLogger("lite_detr")

FOLDER = "common/backbones"


def backbone_from_config(cfg: CfgNode) -> Backbone:
    """Builds a backbone that is registered with Detectron2 or that a lazy config holds.

    Args:
        cfg: ``MODEL.BACKBONE.NAME`` is a registered name such as ``build_resnet_backbone`` or
            ``TimmBackbone``; or one of ``configs/common/backbones`` such as ``swin_tiny``; or a
            file with a lazy ``backbone``. Registered ones read their options from the config.

    Raises:
        ValueError: there is no such backbone; the message lists those that there are.
    """
    name = cfg.MODEL.BACKBONE.NAME
    if name in BACKBONE_REGISTRY:
        return build_backbone(cfg)
    path = f"{FOLDER}/{name}.py" if name in lazy_backbones() else name
    if not path.endswith(".py"):
        registered = sorted(name for name, _ in BACKBONE_REGISTRY)
        raise ValueError(
            f"MODEL.BACKBONE.NAME is {name!r}; registered are {', '.join(registered)}; lazy ones "
            f"are {', '.join(lazy_backbones())}; besides, a file NAME.py with a lazy `backbone`"
        )
    _compare_pixels(cfg, path)
    return instantiate(model_zoo.get_config(path).backbone)


def lazy_backbones() -> list[str]:
    """The names of the backbones in ``configs/common/backbones``."""
    return sorted(path.stem for path in Path(model_zoo.CONFIG_ROOT, FOLDER).glob("*.py"))


def _compare_pixels(cfg: CfgNode, path: str) -> None:
    """Warns of images made otherwise than those that the backbone's weights were trained with."""
    for option, field, given in (
        ("MODEL.PIXEL_MEAN", "pixel_mean", list(cfg.MODEL.PIXEL_MEAN)),
        ("MODEL.PIXEL_STD", "pixel_std", list(cfg.MODEL.PIXEL_STD)),
        ("INPUT.FORMAT", "input_format", cfg.INPUT.FORMAT),
    ):
        try:
            (expected,) = LazyConfig.load(model_zoo.get_config_file(path), (field,))
        except KeyError:  # The file says nothing of it.
            continue
        if expected != given:
            logger.warning(
                "%s is %s, the weights of backbone %s were trained with %s",
                option,
                given,
                cfg.MODEL.BACKBONE.NAME,
                expected,
            )
