"""Datasets: your own COCO-format files, and the embedded digits.

Importing registers the package's own datasets with Detectron2.
"""

import os

from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances

from .digits import CLASSES, SPLITS


def register_digits(root: str) -> None:
    """Register ``digits_train`` and ``digits_val``, as ``lite-detr make-digits`` writes them."""
    for split in SPLITS:
        name = f"digits_{split}"
        if name not in DatasetCatalog:
            register_coco_instances(
                name,
                {"thing_classes": list(CLASSES), "source": "`lite-detr make-digits` writes it"},
                os.path.join(root, f"{split}.json"),
                os.path.join(root, split),
            )


register_digits(
    os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), "digits")
)
