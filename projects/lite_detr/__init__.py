"""Lite DETR for Detectron2: efficient multi-scale DETR detectors (arXiv 2303.07335).

Importing the package registers its meta-architectures and its built-in datasets with Detectron2.
"""

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    raise ModuleNotFoundError(
        "lite_detr needs Detectron2, which is not installed: run `make install` in a checkout of "
        "lite-detr, or install upstream with `pip install --no-build-isolation "
        "git+https://github.com/facebookresearch/detectron2`, or the redistribution "
        "`sal-detectron2` as docs/install.md shows.",
        name="detectron2",
    ) from None

from . import data, modeling, ops, patches
from .inference import optimize_for_inference
from .version import __version__
from .yacs import add_lite_detr_config

__all__ = [
    "__version__",
    "add_lite_detr_config",
    "data",
    "modeling",
    "ops",
    "optimize_for_inference",
    "patches",
]
