"""Registration of COCO-format datasets in Detectron2's catalogs, from paths or from a config."""

import difflib
import os
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager
from omegaconf import OmegaConf

from .coco_checks import (
    CocoSummary,
    DatasetError,
    check_coco,
    clip_boxes,
    get_section,
    load_json,
    no_annotations,
)

__all__ = [
    "CocoSummary",
    "DatasetError",
    "apply_data_config",
    "check_coco",
    "check_for_detection",
    "check_registered",
    "check_same_categories",
    "register_coco",
]


class Categories(Protocol):
    """What both summaries of a dataset say of its classes, in the order of the ids."""

    categories: tuple[str, ...]
    category_ids: tuple[int, ...]


TRAIN_KEYS = ("train_json", "train_images")
VAL_KEYS = ("val_json", "val_images")
SETTINGS_OF = {"train": TRAIN_KEYS + VAL_KEYS, "test": VAL_KEYS}


def register_coco(name, json_file, image_root, for_evaluation=False) -> CocoSummary:
    """Checks a COCO-format dataset and registers it under ``name``, replacing one of that name.

    What Detectron2 loads for this name has boxes clipped to the image, and no annotation whose
    box has no area inside the image. The arguments are those of ``check_coco``.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    summary = check_coco(json_file, image_root, for_evaluation)
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(name, None)
    metadata = {
        "thing_classes": list(summary.categories),
        "thing_dataset_id_to_contiguous_id": {
            category_id: i for i, category_id in enumerate(summary.category_ids)
        },
    }
    register_coco_instances(name, metadata, json_file, image_root)
    load = DatasetCatalog[name]
    DatasetCatalog[name] = lambda: [_with_usable_boxes(record) for record in load()]
    return summary


def apply_data_config(cfg, splits=("train", "test")) -> None:
    """Registers the dataset that ``cfg.data`` gives by paths and points the config at it.

    Sets the dataset names of the data loaders and ``cfg.model.num_classes``. Does nothing where
    all of ``cfg.data`` is None. Writes no file, so each process of a job can call it.

    Args:
        cfg: lazy config with ``data.train_json``, ``train_images``, ``val_json``, ``val_images``.
        splits: the data loaders that the run uses; without "train", the training set is not
            looked at.
    """
    paths = given_paths(cfg)
    if not paths:
        return
    has_train = "train" in splits and any(key in paths for key in TRAIN_KEYS)
    required = SETTINGS_OF["train" if has_train else "test"]
    missing = [key for key in required if key not in paths]
    if missing:
        raise DatasetError(
            f"{_settings(missing)} missing: given {_settings(paths)}; accepted are all of "
            f"{_settings(SETTINGS_OF['train'])}, or for evaluation {_settings(VAL_KEYS)}"
        )

    val = _register_split(cfg, "test", paths["val_json"], paths["val_images"])
    if has_train:
        train = _register_split(cfg, "train", paths["train_json"], paths["train_images"])
        if not train.num_annotations:
            raise DatasetError(no_annotations(paths["train_json"]))
        check_same_categories(paths["train_json"], train, paths["val_json"], val)
    cfg.model.num_classes = len(val.categories)


def given_paths(cfg) -> dict[str, str]:
    """Those of the paths of ``cfg.data`` that are not None, by their keys."""
    given = cfg.get("data") or {}
    # A folder named 2017 comes out of the command line as a number, hence str().
    return {key: str(given[key]) for key in SETTINGS_OF["train"] if given.get(key) is not None}


def class_metadata(cfg) -> Metadata | None:
    """The metadata of the config's test set, which names the classes.

    None if it does not name as many as the model has; Detectron2 then draws their numbers.
    """
    names = cfg.dataloader.test.dataset.names
    for name in [names] if isinstance(names, str) else names or []:
        metadata = MetadataCatalog.get(name)
        if len(metadata.get("thing_classes", [])) == cfg.model.num_classes:
            return metadata
    return None


def check_registered(cfg, splits=("train", "test")) -> None:
    """Checks that the datasets that a config names are registered, present and fit the model.

    So must the order of the channels in which images are read.

    Args:
        cfg: lazy config with ``dataloader.<split>.dataset.names`` and ``model.num_classes``.
        splits: the data loaders to look at.
    """
    for split in splits:
        _check_image_format(cfg, split)
        names = cfg.dataloader[split].dataset.names
        if not names:
            raise DatasetError(
                f"dataloader.{split}.dataset.names is {names!r}; set it to the name of a "
                f"registered dataset, or give {_settings(SETTINGS_OF[split])}"
            )
        for name in [names] if isinstance(names, str) else names:
            if name not in DatasetCatalog:
                raise DatasetError(_explain_unknown(name, split))
            check_for_detection(name)
            metadata = MetadataCatalog.get(name)
            _check_files(name, metadata)
            _check_num_classes(name, metadata, cfg.model.num_classes)


def check_for_detection(name) -> None:
    """Refuses a dataset of the catalog that is evaluated by more than boxes or masks of objects.

    What is not registered, or says nothing of how it is evaluated, passes.
    """
    registered = name in MetadataCatalog.list()
    kind = MetadataCatalog.get(name).get("evaluator_type", "") if registered else ""
    if "panoptic" in kind or "sem_seg" in kind:
        raise DatasetError(
            f"dataset {name!r} is for evaluation of type {kind!r}, and the detectors find boxes: "
            "name a detection dataset, such as coco_2017_train"
        )


def check_same_categories(train_json, train: Categories, val_json, val: Categories) -> None:
    """Raises a ``DatasetError`` where two files list other categories, by id or by name."""
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


def _with_usable_boxes(record):
    """Clips the boxes of one Detectron2 record and drops the annotations that have none left."""
    annotations = record["annotations"]
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    sizes = np.array([[record["width"], record["height"]]], dtype=np.float64)
    boxes, usable = clip_boxes(boxes, sizes)
    record["annotations"] = [
        {**annotation, "bbox": box}
        for annotation, box, keep in zip(annotations, boxes.tolist(), usable)
        if keep
    ]
    return record


def _settings(keys):
    return ", ".join(f"data.{key}" for key in keys)


def _register_split(cfg, split, json_file, image_root):
    # The checksum of the path keeps apart datasets that share a file name, like two train.json.
    checksum = zlib.crc32(os.fsencode(os.path.abspath(json_file)))
    name = f"{Path(json_file).stem}_{split}_{checksum:08x}"
    summary = register_coco(name, json_file, image_root, for_evaluation=split == "test")
    cfg.dataloader[split].dataset.names = name
    return summary


def _explain_unknown(name, split):
    nearest = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
    hint = f"; nearest registered names: {', '.join(nearest)}" if nearest else ""
    return (
        f"dataset {name!r} (dataloader.{split}.dataset.names) is not registered{hint}; correct "
        "the name, register it with lite_detr.data.coco.register_coco(name, json_file, "
        f"image_root) in the config file, or give {_settings(SETTINGS_OF[split])} instead"
    )


def _check_files(name, metadata):
    for key, kind, exists in (
        ("json_file", "file", os.path.isfile),
        ("image_root", "folder", os.path.isdir),
    ):
        path = str(metadata.get(key, ""))
        # Detectron2 fetches what is given as a URL when it loads the dataset.
        if path and "://" not in path and not exists(path):
            raise DatasetError(
                f"dataset {name!r} expects {path}: {kind} not found; "
                f"{_explain_source(metadata)}{_explain_location(path)}"
                f"or give the paths of your own files with {_settings(SETTINGS_OF['train'])} "
                "(for evaluation only the last two)"
            )


def _explain_source(metadata):
    """Says where a dataset comes from, if it was registered with a word on that."""
    source = metadata.get("source")
    return f"{source}, " if source else ""


def _explain_location(path):
    """Says how to move a path that lies in the folder of Detectron2's built-in datasets."""
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    relative = os.path.relpath(path, root)
    if relative.startswith(os.pardir):
        return "register the dataset with the path where it is, "
    first = Path(relative).parts[0]
    return f"set DETECTRON2_DATASETS to the folder that holds {first}/ (now {root}), "


def _check_image_format(cfg, split):
    key = f"dataloader.{split}.mapper.image_format"
    given, expected = OmegaConf.select(cfg, key), OmegaConf.select(cfg, "model.input_format")
    if given and expected and given != expected:
        raise DatasetError(
            f"{key} is {given}, but model.input_format is {expected}: set both to what the "
            "backbone's weights were trained with"
        )


def _check_num_classes(name, metadata, num_classes):
    classes = metadata.get("thing_classes")
    if classes is None and metadata.get("evaluator_type") == "coco":
        # Detectron2 fills in thing_classes only when it loads the dataset.
        json_file = PathManager.get_local_path(metadata.json_file)
        classes = get_section(json_file, load_json(json_file), "categories")
    if classes is not None and len(classes) != num_classes:
        raise DatasetError(
            f"dataset {name!r} has {len(classes)} classes but model.num_classes is {num_classes}; "
            f"set model.num_classes={len(classes)} or name a dataset with {num_classes} classes"
        )
