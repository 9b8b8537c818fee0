"""Access to the configs that ship with the package, in the manner of ``detectron2.model_zoo``."""

import contextlib
import difflib
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, LazyConfig, get_cfg
from omegaconf import DictConfig

from .errors import ConfigError, MissingFileError
from .yacs.config import add_lite_detr_config

CONFIG_ROOT = Path(__file__).parent / "configs"
YAML_SUFFIXES = (".yaml", ".yml")
# Where the backbones lie, a file each.
BACKBONES = "common/backbones"


def list_configs(suffix: str = ".py") -> list[str]:
    """The names of all models' configs, such as ``deformable_detr/....py``.

    Args:
        suffix: ``.py`` for lazy configs, ``.yaml`` for those of the main models that Detectron2's
            ``get_cfg()`` takes.
    """
    names = (path.relative_to(CONFIG_ROOT).as_posix() for path in CONFIG_ROOT.rglob(f"*{suffix}"))
    return sorted(name for name in names if not name.startswith("common/"))


def list_backbones() -> list[str]:
    """The names of the backbones in ``configs/common/backbones``, such as ``swin_tiny``."""
    return sorted(path.stem for path in Path(CONFIG_ROOT, BACKBONES).glob("*.py"))


def get_config_file(name: str) -> str:
    """The path of a config file.

    Args:
        name: a file of one's own, or a name of :func:`list_configs`.

    Raises:
        MissingFileError: there is neither; the message names those that come closest.
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
    """As :func:`get_config_file`, for a lazy config.

    Raises:
        ConfigError: it is a YAML file.
    """
    path = get_config_file(name)
    if path.endswith(YAML_SUFFIXES):
        raise ConfigError(
            f"config {name!r} is a YAML file, and a lazy config (NAME.py) is needed here: YAML is "
            "for Detectron2's DefaultTrainer, DefaultPredictor and tools, and in Python for "
            "lite_detr.model_zoo.get_yaml_config"
        )
    return path


def get_config(name: str) -> DictConfig:
    """The lazy config of a model: ``model``, ``dataloader``, ``optimizer``, ``train`` and so on.

    Raises:
        ConfigError: it is a YAML file.
    """
    return LazyConfig.load(get_lazy_config_file(name))


def get_fields(name: str, *fields: str) -> dict[str, Any]:
    """Those of the fields that a lazy config has: lists and texts, too, which get_config drops."""
    path = get_lazy_config_file(name)
    found = {}
    for field in fields:
        with contextlib.suppress(KeyError):
            found[field] = LazyConfig.load(path, field)
    return found


def get_yaml_config(name: str) -> CfgNode:
    """The config of a model for ``DefaultPredictor`` and ``DefaultTrainer``, from a YAML file.

    Raises:
        ConfigError: it is a lazy config.
    """
    path = get_config_file(name)
    if not path.endswith(YAML_SUFFIXES):
        raise ConfigError(
            f"config {name!r} is no YAML file, which is needed here (NAME.yaml): lazy configs are "
            "for train_net.py, and in Python for lite_detr.model_zoo.get_config"
        )
    cfg = get_cfg()
    add_lite_detr_config(cfg)
    cfg.merge_from_file(path)
    return cfg
