"""Lite DETR for Detectron2: efficient multi-scale DETR detectors (arXiv 2303.07335).

The package registers its meta-architectures and its built-in datasets with Detectron2: when it is
imported, if Detectron2 has been, and otherwise when one of the names below is used, a config is
read or a detector is built. Until then it imports neither PyTorch nor Detectron2, so that programs
answer a ``--help`` or a wrong argument at once.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .errors import MissingPackageError
from .version import __version__

if TYPE_CHECKING:
    # For editors and the pages of the API; see __getattr__.
    from . import baselines, data, hub, interop, modeling, ops, patches
    from .hub import from_pretrained
    from .inference import optimize_for_inference
    from .yacs import add_lite_detr_config

# The public names, and the modules that have them; a module stands for itself.
_NAMES = {
    "add_lite_detr_config": "yacs",
    "baselines": "baselines",
    "data": "data",
    "from_pretrained": "hub",
    "hub": "hub",
    "interop": "interop",
    "modeling": "modeling",
    "ops": "ops",
    "optimize_for_inference": "inference",
    "patches": "patches",
}
_registered = False

__all__ = [
    "__version__",
    "add_lite_detr_config",
    "baselines",
    "data",
    "from_pretrained",
    "hub",
    "interop",
    "modeling",
    "ops",
    "optimize_for_inference",
    "patches",
    "register",
]


def register() -> None:
    """Register everything with Detectron2; does nothing if that has been done.

    Raises:
        MissingPackageError: Detectron2 is not installed.
    """
    global _registered
    if _registered:
        return
    if not has_detectron2():
        raise MissingPackageError(
            "lite_detr needs Detectron2, which is not installed: run `make install` in a checkout "
            "of lite-detr, or install upstream with `pip install --no-build-isolation "
            "git+https://github.com/facebookresearch/detectron2`, or the redistribution "
            "`sal-detectron2` as docs/install.md shows"
        )
    _registered = True
    for name in dict.fromkeys(_NAMES.values()):
        # These register nothing.
        if name not in ("hub", "interop"):
            importlib.import_module(f".{name}", __name__)


def has_detectron2() -> bool:
    """Return whether Detectron2 is installed; if so, it is imported."""
    try:
        importlib.import_module("detectron2")
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        return False
    return True


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # These need no Detectron2.
    if name not in ("interop", "ops"):
        register()
    module = importlib.import_module(f".{_NAMES[name]}", __name__)
    return module if _NAMES[name] == name else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})


if "detectron2" in sys.modules:
    register()
elif "torch" in sys.modules:
    # For programs that load an exported detector and use no name of the package.
    importlib.import_module(".ops", __name__)
