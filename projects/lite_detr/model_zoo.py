"""Access to the configs that ship with the package, in the manner of ``detectron2.model_zoo``."""

import difflib
from pathlib import Path

from detectron2.config import LazyConfig
from omegaconf import DictConfig

CONFIG_ROOT = Path(__file__).parent / "configs"


def list_configs() -> list[str]:
    """The names of all models' configs, such as ``deformable_detr/....py``."""
    names = (path.relative_to(CONFIG_ROOT).as_posix() for path in CONFIG_ROOT.rglob("*.py"))
    return sorted(name for name in names if not name.startswith("common/"))


def get_config_file(name: str) -> str:
    """The path of a config file.

    Args:
        name: a file of one's own, or a name of :func:`list_configs`.

    Raises:
        FileNotFoundError: there is neither; the message names those that come closest.
    """
    for path in (Path(name), CONFIG_ROOT / name):
        if path.is_file():
            return str(path)
    close = difflib.get_close_matches(name, list_configs(), n=3, cutoff=0.4)
    raise FileNotFoundError(
        f"config {name!r} is neither a file nor one of the model zoo's; "
        + (f"did you mean {' or '.join(close)}?" if close else "list_configs() names them all")
    )


def get_config(name: str) -> DictConfig:
    """The lazy config of a model: ``model``, ``dataloader``, ``optimizer``, ``train`` and so on."""
    return LazyConfig.load(get_config_file(name))
