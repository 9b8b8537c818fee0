"""Read the configs that ship with the package, in the manner of ``detectron2.model_zoo``.

Functions that read a config import Detectron2; those that find one do not, so that programs answer
a wrong name at once.
"""

import contextlib
import difflib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import register
from .errors import ConfigError, MissingFileError
from .labels import first_line

logger = logging.getLogger("lite_detr")

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from omegaconf import DictConfig

CONFIG_ROOT = Path(__file__).parent / "configs"
YAML_SUFFIXES = (".yaml", ".yml")
# The folder of the backbones, one file each.
BACKBONES = "common/backbones"


def list_configs(suffix: str = ".py") -> list[str]:
    """Return the names of all models' configs, such as ``deformable_detr/....py``.

    Args:
        suffix: ``.py`` for lazy configs, ``.yaml`` for YAML configs, which the main models have.
    """
    names = (path.relative_to(CONFIG_ROOT).as_posix() for path in CONFIG_ROOT.rglob(f"*{suffix}"))
    return sorted(name for name in names if not name.startswith("common/"))


def list_backbones() -> list[str]:
    """Return the names of the backbones in ``configs/common/backbones``, such as ``swin_tiny``."""
    return sorted(path.stem for path in Path(CONFIG_ROOT, BACKBONES).glob("*.py"))


def get_config_file(name: str) -> str:
    """Return the path of a config file.

    Args:
        name: your own file, or a name of :func:`list_configs`.

    Raises:
        MissingFileError: there is neither; the message suggests similar names.
    """
    for path in (Path(name), CONFIG_ROOT / name):
        if path.is_file():
            return str(path)
    names = list_configs(".yaml" if name.endswith(YAML_SUFFIXES) else ".py")
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    raise MissingFileError(
        f"config {name!r} is neither a file nor one of the model zoo's; "
        + (f"did you mean {' or '.join(close)}?" if close else "list_configs() names them all")
    )


def get_lazy_config_file(name: str) -> str:
    """Return the path of a lazy config, see :func:`get_config_file`.

    The ``config.yaml`` that a training run saves is a lazy config.

    Raises:
        MissingFileError: there is no such config.
        ConfigError: it is a YAML config of Detectron2.
    """
    path = get_config_file(name)
    if path.endswith(YAML_SUFFIXES) and not is_saved_lazy_config(path):
        raise ConfigError(
            f"config {name!r} is a YAML file, and a lazy config is needed here (NAME.py, or the "
            "config.yaml of a training run): this YAML is for Detectron2's DefaultTrainer, "
            "DefaultPredictor and tools, and in Python for lite_detr.model_zoo.get_yaml_config"
        )
    return path


def is_saved_lazy_config(path: str) -> bool:
    """Return whether a YAML file is a lazy config, whose keys are in small letters."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return any(line.startswith("model:") for line in file)


def get_config(name: str) -> "DictConfig":
    """Return the lazy config of a model: ``model``, ``dataloader``, ``optimizer``, ``train``, ...

    Raises:
        MissingFileError: there is no such config.
        ConfigError: it is a YAML config of Detectron2, or cannot be read.
    """
    path = get_lazy_config_file(name)
    register()
    import yaml
    from detectron2.config import LazyConfig

    try:
        cfg = LazyConfig.load(path)
    except yaml.YAMLError as error:
        raise ConfigError(f"config {name!r} is not valid YAML: {first_line(error)}") from error
    if path.endswith(YAML_SUFFIXES):
        use_available_device(cfg, name)
    return cfg


def use_available_device(cfg: "DictConfig", name: str) -> None:
    """Put a config that was saved on a machine with a GPU on the CPU, where there is no GPU."""
    import torch

    if not str(cfg.train.device).startswith("cuda") or torch.cuda.is_available():
        return
    logger.warning("config %s was saved with train.device=%s: no GPU here", name, cfg.train.device)
    cfg.train.device = "cpu"
    cfg.train.ddp.device_ids = None


def get_fields(name: str, *fields: str) -> dict[str, Any]:
    """Return those fields that a lazy config has; unlike get_config, also lists and strings."""
    path = get_lazy_config_file(name)
    register()
    from detectron2.config import LazyConfig

    found = {}
    for field in fields:
        with contextlib.suppress(KeyError):
            found[field] = LazyConfig.load(path, field)
    return found


def get_yaml_config(name: str) -> "CfgNode":
    """Return the config of a model for ``DefaultPredictor`` and ``DefaultTrainer``.

    Args:
        name: a YAML file of your own, or a name of ``list_configs(".yaml")``.

    Raises:
        MissingFileError: there is no such config.
        ConfigError: it is a lazy config.
    """
    path = get_config_file(name)
    if not path.endswith(YAML_SUFFIXES):
        raise ConfigError(
            f"config {name!r} is not a YAML file, which is needed here (NAME.yaml): lazy configs "
            "are for train_net.py, and in Python for lite_detr.model_zoo.get_config"
        )
    from detectron2.config import get_cfg

    cfg = get_cfg()
    add_lite_detr_config(cfg)
    cfg.merge_from_file(path)
    return cfg


def add_lite_detr_config(cfg: "CfgNode") -> None:
    """Add ``MODEL.DETR``, the options of our backbones and ``SOLVER.LR_FACTORS`` to a config.

    Nothing else changes. None and empty values stand for those of the lazy configs, so each default
    has one place. A second call does nothing.

    Raises:
        ConfigError: the config has a ``MODEL.DETR`` of another project.
    """
    register()
    from detectron2.config import CfgNode

    if "DETR" in cfg.MODEL:
        if "ENCODER" in cfg.MODEL.DETR:
            return
        raise ConfigError(
            f"the config has a MODEL.DETR of another project, with {list(cfg.MODEL.DETR)}: call "
            "add_lite_detr_config on a config without it, such as a fresh get_cfg()"
        )

    cfg.MODEL.DETR = CfgNode()
    # The lazy config with the detector's `model`, a file or a name of the model zoo; empty for that
    # of MODEL.META_ARCHITECTURE, which is DeformableDETR, DINO or HDETR.
    cfg.MODEL.DETR.DETECTOR = ""
    # "full", or an interleaved encoder in the paper's notation, such as "H3L1-(2+1)x3".
    cfg.MODEL.DETR.ENCODER = ""
    # "deformable" or "key_aware", in the encoder and in the decoder.
    cfg.MODEL.DETR.ATTENTION = ""
    cfg.MODEL.DETR.NUM_CLASSES = None
    cfg.MODEL.DETR.NUM_QUERIES = None
    # The number of scales.
    cfg.MODEL.DETR.NUM_LEVELS = None
    # The backbone's maps, fine to coarse; None selects those with strides 8, 16 and 32.
    cfg.MODEL.DETR.IN_FEATURES = None
    # Detections with a lower score are dropped.
    cfg.MODEL.DETR.SCORE_THRESH_TEST = None
    # None uses TEST.DETECTIONS_PER_IMAGE.
    cfg.MODEL.DETR.DETECTIONS_PER_IMAGE = None

    # The arguments of TimmBackbone and TorchvisionBackbone, if MODEL.BACKBONE.NAME is one.
    cfg.MODEL.TIMM = CfgNode()
    cfg.MODEL.TIMM.MODEL_NAME = None
    cfg.MODEL.TIMM.OUT_STRIDES = None
    cfg.MODEL.TIMM.PRETRAINED = None
    cfg.MODEL.TIMM.WEIGHTS = None
    cfg.MODEL.TIMM.FROZEN_NORM = None
    cfg.MODEL.TIMM.FROZEN_STRIDE = None
    cfg.MODEL.TIMM.SIZE_DIVISIBILITY = None
    cfg.MODEL.TIMM.OPTIONS = CfgNode(new_allowed=True)
    cfg.MODEL.TORCHVISION = CfgNode()
    cfg.MODEL.TORCHVISION.MODEL_NAME = None
    cfg.MODEL.TORCHVISION.OUT_STRIDES = None
    cfg.MODEL.TORCHVISION.WEIGHTS = None
    cfg.MODEL.TORCHVISION.RETURN_NODES = None
    cfg.MODEL.TORCHVISION.FROZEN_NORM = None
    cfg.MODEL.TORCHVISION.FROZEN_STRIDE = None
    cfg.MODEL.TORCHVISION.SIZE_DIVISIBILITY = None

    # Pairs of a part of parameter names and a factor for their learning rate; the first match
    # counts. None uses those of configs/common/optimizer.py.
    cfg.SOLVER.LR_FACTORS = None
