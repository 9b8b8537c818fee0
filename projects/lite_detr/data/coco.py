"""Registration of COCO-format datasets in Detectron2's catalogs, from paths or from a config."""

import logging
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import DictConfig

from ..errors import DatasetError
from .catalog import (
    SETTINGS_OF,
    TRAIN_KEYS,
    check_for_detection,
    check_registered,
    class_metadata,
    list_settings,
)
from .coco_checks import check_coco, no_objects_reason
from .coco_file import CocoSummary, coco_to_records, contiguous_ids, load_coco

__all__ = [
    "CocoSummary",
    "DatasetError",
    "apply_data_config",
    "check_coco",
    "check_for_detection",
    "check_registered",
    "check_same_categories",
    "class_metadata",
    "given_paths",
    "register_coco",
]

logger = logging.getLogger("lite_detr")


class Categories(Protocol):
    """The classes of a dataset's summary, in the order of the ids."""

    categories: tuple[str, ...]
    category_ids: tuple[int, ...]


def register_coco(name, json_file, image_root, for_evaluation=False) -> CocoSummary:
    """Check a COCO-format dataset and register it under ``name``, replacing one of that name.

    Its records have boxes clipped to the image, no annotation whose box has no area inside the
    image, and masks where these are sound. The file is read again whenever they are loaded.

    Args:
        name: for Detectron2's catalogs.
        json_file, image_root, for_evaluation: see :func:`check_coco`.

    Raises:
        DatasetError: something in the dataset would stop a run.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    summary = check_coco(json_file, image_root, for_evaluation)
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(name, None)

    def load() -> list[dict]:
        records = coco_to_records(load_coco(json_file), image_root)
        logger.info("Loaded %d images from %s", len(records), json_file)
        return records

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=list(summary.categories),
        thing_dataset_id_to_contiguous_id=contiguous_ids(summary.category_ids),
        checked=True,
        num_objects=summary.num_objects,
    )
    return summary


def apply_data_config(cfg: DictConfig, splits: Sequence[str] = ("train", "test")) -> None:
    """Register the dataset that ``cfg.data`` gives by paths and point the config at it.

    Sets the dataset names of the data loaders and ``cfg.model.num_classes``. Does nothing if all
    of ``cfg.data`` is None. Writes no file, so each process of a job can call it.

    Args:
        cfg: lazy config with ``data.train_json``, ``train_images``, ``val_json``, ``val_images``.
        splits: the data loaders that the run uses; without "train", the training set is ignored.

    Raises:
        DatasetError: a path is missing, or a dataset cannot be used.
    """
    paths = given_paths(cfg)
    if not paths:
        return
    has_train = "train" in splits and any(key in paths for key in TRAIN_KEYS)
    required = SETTINGS_OF["train" if has_train else "test"]
    missing = [key for key in required if key not in paths]
    if missing:
        raise DatasetError(
            f"{list_settings(missing)} missing: given {list_settings(paths)}; accepted are all of "
            f"{list_settings(SETTINGS_OF['train'])}, or for evaluation "
            f"{list_settings(SETTINGS_OF['test'])}"
        )

    val = _register_split(cfg, "test", paths["val_json"], paths["val_images"])
    if has_train:
        train = _register_split(cfg, "train", paths["train_json"], paths["train_images"])
        reason = no_objects_reason(paths["train_json"], train.num_annotations, train.num_objects)
        if reason:
            raise DatasetError(reason)
        check_same_categories(paths["train_json"], train, paths["val_json"], val)
    cfg.model.num_classes = len(val.categories)


def given_paths(cfg: DictConfig) -> dict[str, str]:
    """Return the paths of ``cfg.data`` that are not None, by their keys."""
    given = cfg.get("data") or {}
    # A folder named 2017 comes out of the command line as a number, hence str().
    return {key: str(given[key]) for key in SETTINGS_OF["train"] if given.get(key) is not None}


def check_same_categories(train_json, train: Categories, val_json, val: Categories) -> None:
    """Raise a ``DatasetError`` if two files list different categories, by id or by name."""
    in_train, in_val = (set(zip(s.category_ids, s.categories)) for s in (train, val))
    if in_train != in_val:
        only_train, only_val = (
            ", ".join(f"{i} {name!r}" for i, name in sorted(pairs)) or "none"
            for pairs in (in_train - in_val, in_val - in_train)
        )
        raise DatasetError(
            f"{train_json} and {val_json} must list the same categories, ids and names, but only "
            f"the first lists: {only_train}; only the second lists: {only_val}; "
            "make their 'categories' equal"
        )


def _register_split(cfg, split, json_file, image_root):
    # The checksum of the path separates datasets that share a file name, like two train.json.
    checksum = zlib.crc32(os.fsencode(os.path.abspath(json_file)))
    name = f"{Path(json_file).stem}_{split}_{checksum:08x}"
    summary = register_coco(name, json_file, image_root, for_evaluation=split == "test")
    MetadataCatalog.get(name).set(from_paths=True)
    cfg.dataloader[split].dataset.names = name
    return summary
