"""Datasets: COCO-format files of one's own, and the embedded digits.

Importing registers the package's own datasets with Detectron2.
"""

from . import builtin  # noqa: F401
