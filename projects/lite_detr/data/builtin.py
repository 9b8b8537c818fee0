"""Registers the package's own datasets where Detectron2 looks for its built-in ones."""

import os

from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances

from .digits import CLASSES, SPLITS


def register_digits(root: str) -> None:
    """``digits_train`` and ``digits_val``, as ``tools/make_digits.py`` writes them to ``root``."""
    for split in SPLITS:
        name = f"digits_{split}"
        if name not in DatasetCatalog:
            register_coco_instances(
                name,
                {"thing_classes": list(CLASSES), "source": "run tools/make_digits.py to write it"},
                os.path.join(root, f"{split}.json"),
                os.path.join(root, split),
            )


register_digits(
    os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), "digits")
)
