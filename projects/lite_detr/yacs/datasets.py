"""The datasets of a YAML config, compared with the detector before it is trained."""

import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data.coco_file import load_coco
from ..errors import ConfigError

# Where other detectors of Detectron2 have the number of their classes.
OTHER_KEYS = (("ROI_HEADS", "NUM_CLASSES"), ("RETINANET", "NUM_CLASSES"))


def dataset_classes(name: str) -> list[str] | None:
    """Return the names of a dataset's classes; None if they are known only when it is loaded."""
    metadata = MetadataCatalog.get(name)
    if classes := metadata.get("thing_classes"):
        return list(classes)
    json_file = metadata.get("json_file", "")
    # Detectron2 reads the names when it loads the file, and says what is missing.
    if metadata.get("evaluator_type") != "coco" or not os.path.isfile(json_file):
        return None
    categories = sorted(load_coco(json_file)["categories"], key=lambda category: category["id"])
    return [str(category.get("name")) for category in categories]


def check_classes(cfg: CfgNode, num_classes: int) -> tuple[str, ...] | None:
    """Compare the classes of the datasets of a YAML config with those of its detector.

    Returns:
        The names of the classes of the first dataset for training; None if they are unknown.

    Raises:
        ConfigError: a dataset has another number of classes than the detector.
    """
    names = None
    for key, datasets in (("TRAIN", cfg.DATASETS.TRAIN), ("TEST", cfg.DATASETS.TEST)):
        for name in datasets:
            classes = dataset_classes(name) if name in DatasetCatalog else None
            if classes is None:
                continue
            if len(classes) != num_classes:
                raise ConfigError(
                    _explain(cfg, f"{name!r} (DATASETS.{key})", len(classes), num_classes)
                )
            names = names or tuple(classes)
    return names


def _explain(cfg: CfgNode, dataset: str, found: int, num_classes: int) -> str:
    other = next(
        (f"MODEL.{node}.{key}" for node, key in OTHER_KEYS if cfg.MODEL[node][key] == found), ""
    )
    hint = f"; {other}, which is {found}, is for other detectors" if other else ""
    return (
        f"dataset {dataset} has {found} classes and the detector {num_classes}: set "
        f"MODEL.DETR.NUM_CLASSES to {found}{hint}"
    )
