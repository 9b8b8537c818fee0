"""The datasets of Detectron2's catalog that a config names: checks, classes, and test sets."""

import copy
import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.utils.data import Dataset

from ..errors import DatasetError
from .coco_checks import (
    MASK_WITHOUT_AREA,
    count_objects,
    find_faults,
    no_objects_reason,
    report_faults,
)
from .coco_file import load_coco, records_to_coco
from .evaluator import (
    OTHER_EVALUATORS,
    DetectionEvaluator,
    load_records,
    refuse_other_evaluator,
)

TRAIN_KEYS = ("train_json", "train_images")
VAL_KEYS = ("val_json", "val_images")
SETTINGS_OF = {"train": TRAIN_KEYS + VAL_KEYS, "test": VAL_KEYS}


def list_settings(keys: Sequence[str]) -> str:
    """Return keys of ``data`` as they are given on the command line."""
    return ", ".join(f"data.{key}" for key in keys)


def dataset_names(cfg: DictConfig, split: str) -> list[str]:
    """Return the names of a split's datasets, each once."""
    names = cfg.dataloader[split].dataset.names
    return [names] if isinstance(names, str) else list(dict.fromkeys(names or ()))


def class_metadata(cfg: DictConfig, trained: Sequence[str] | None = None) -> Metadata | None:
    """Return the metadata that name the classes, as many as the model has.

    Those of the config's test set if its paths are given, as ``data.val_json``; otherwise the names
    in the weights; otherwise those of the config's test set. None if none are known; Detectron2
    then draws the numbers of the classes.

    Args:
        cfg: lazy config with ``model.num_classes``.
        trained: the names that came with the weights, a detector's ``class_names``.
    """
    names = dataset_names(cfg, "test")
    if trained and not any(MetadataCatalog.get(name).get("from_paths") for name in names):
        return Metadata(thing_classes=list(trained))
    for name in names:
        metadata = MetadataCatalog.get(name)
        if len(metadata.get("thing_classes", [])) == cfg.model.num_classes:
            return metadata
    return None


def split_test_sets(cfg: DictConfig) -> dict[str, tuple[DictConfig, DictConfig]]:
    """Return the configs of each test set's loader and evaluator, by the test set's name.

    ``dataloader.evaluator`` is one config for all test sets, whose ``dataset_name`` is
    ``${..test.dataset.names}``, or a list with one for each.

    Raises:
        DatasetError: a test set has no evaluator, or one for another dataset.
    """
    names, found = dataset_names(cfg, "test"), {}
    for position, name in enumerate(names):
        # Not the whole config: a training run keeps its model there.
        dataloader = copy.deepcopy(cfg.dataloader)
        dataloader.test.dataset.names = name
        evaluator = dataloader.evaluator
        if isinstance(evaluator, ListConfig):
            if len(evaluator) != len(names):
                raise DatasetError(
                    f"dataloader.evaluator lists {len(evaluator)} evaluators for the {len(names)} "
                    "sets of dataloader.test.dataset.names: give one for each, or one for all "
                    "with dataset_name=${..test.dataset.names}"
                )
            evaluator = evaluator[position]
        evaluated = evaluator.get("dataset_name", name)
        if evaluated != name:
            raise DatasetError(
                f"the evaluator of test set {name!r} has dataset_name={evaluated!r}: set "
                "dataloader.evaluator.dataset_name to ${..test.dataset.names}, or list an "
                "evaluator for each test set"
            )
        found[name] = dataloader.test, evaluator
    return found


def check_registered(cfg: DictConfig, splits: Sequence[str] = ("train", "test")) -> None:
    """Check the datasets that a config names: registered, present, sound, fit for the model.

    Also checks the order of the channels in which images are read, and the evaluators.

    Args:
        cfg: lazy config with ``dataloader.<split>.dataset.names`` and ``model.num_classes``.
        splits: the data loaders to check.

    Raises:
        DatasetError: a dataset does not pass.
    """
    for split in splits:
        _check_image_format(cfg, split)
        check_named(cfg, split)
        uses_coco = split == "test" and uses_coco_metrics(cfg)
        names, num_objects = dataset_names(cfg, split), 0
        for name in names:
            if uses_coco:
                refuse_other_evaluator(name, MetadataCatalog.get(name))
            num_objects += _check_contents(name, split, cfg.model.num_classes)
        if split == "train" and not num_objects:
            source = f"dataloader.train.dataset.names={', '.join(names)}"
            raise DatasetError(no_objects_reason(source, 1, 0))
    _check_same_classes([name for split in splits for name in dataset_names(cfg, split)])


def check_named(cfg: DictConfig, split: str) -> None:
    """Check that a split's datasets are registered, for detection, and that their files exist.

    Raises:
        DatasetError: one is not, or none is named.
    """
    names = dataset_names(cfg, split)
    if not names:
        raise DatasetError(
            f"dataloader.{split}.dataset.names is {cfg.dataloader[split].dataset.names!r}; set it "
            f"to the name of a registered dataset, or give {list_settings(SETTINGS_OF[split])}"
        )
    for name in names:
        if name not in DatasetCatalog:
            raise DatasetError(_explain_unknown(name, split))
        check_for_detection(name)
        _check_files(name, MetadataCatalog.get(name))


def check_for_detection(name: str) -> None:
    """Refuse a dataset of the catalog that is evaluated by more than boxes or masks of objects.

    A dataset that is not registered, or does not say how it is evaluated, passes.
    """
    registered = name in MetadataCatalog.list()
    kind = MetadataCatalog.get(name).get("evaluator_type", "") if registered else ""
    if "panoptic" in kind or "sem_seg" in kind:
        raise DatasetError(
            f"dataset {name!r} is for evaluation of type {kind!r}, and the detectors find boxes: "
            "name a detection dataset, such as coco_2017_train"
        )


def load_named_content(name: str, split: str) -> tuple[str, str, dict] | None:
    """Return a dataset of the catalog as messages name it, its image folder and COCO content.

    None for a PyTorch dataset: its records cannot be read without its images.

    Raises:
        DatasetError: it cannot be read, or is not in Detectron2's format.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file") and metadata.get("image_root"):
        json_file = PathManager.get_local_path(metadata.json_file)
        return json_file, metadata.image_root, load_coco(json_file)
    records = load_records(name)
    if isinstance(records, Dataset):
        return None
    classes = metadata.get("thing_classes")
    return f"dataset {name!r}", "", records_to_coco(name, records, classes, split)


def _check_contents(name: str, split: str, num_classes: int) -> int:
    """Check one dataset; return the number of its objects, at least 1 if it is unknown."""
    metadata = MetadataCatalog.get(name)
    classes = metadata.get("thing_classes")
    if classes is not None:
        _check_num_classes(name, len(classes), num_classes)
    if metadata.get("checked"):
        return metadata.num_objects
    if metadata.get("evaluator_type") in OTHER_EVALUATORS or not comm.is_main_process():
        # Its files have another format, or the first process of the job reads them for all.
        return 1
    loaded = load_named_content(name, split)
    if loaded is None:
        return 1
    source, image_root, content = loaded
    if classes is None and metadata.get("json_file"):
        _check_num_classes(name, len(content["categories"]), num_classes)
    elif classes is None:
        largest = max((category["id"] for category in content["categories"]), default=0)
        if largest >= num_classes:
            raise DatasetError(
                f"dataset {name!r} has objects of class {largest}, but model.num_classes is "
                f"{num_classes}, whose classes are 0 to {num_classes - 1}"
            )
    faults = list(find_faults(source, image_root, content, split == "test", in_catalog=True))
    report_faults(faults)
    dropped = {i for fault in faults if fault.kind == MASK_WITHOUT_AREA for i in fault.where}
    kept = [a for a in content["annotations"] if a["id"] not in dropped]
    return count_objects({**content, "annotations": kept})


def uses_coco_metrics(cfg: DictConfig) -> bool:
    """Return whether all test sets are evaluated by a ``DetectionEvaluator``."""
    if cfg.dataloader.get("evaluator") is None:
        return False
    for _, evaluator in split_test_sets(cfg).values():
        tasks = evaluator.get("tasks")
        if isinstance(tasks, (list, tuple, ListConfig)) and list(tasks) != ["bbox"]:
            raise DatasetError(
                f"dataloader.evaluator.tasks=[{','.join(map(str, tasks))}]: the detectors find "
                "boxes, so accepted is [bbox], or null"
            )
        target = evaluator.get("_target_", DetectionEvaluator)
        target = locate(target) if isinstance(target, str) else target
        if not (isinstance(target, type) and issubclass(target, DetectionEvaluator)):
            return False
    return True


def _explain_unknown(name, split):
    nearest = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
    hint = f"; nearest registered names: {', '.join(nearest)}" if nearest else ""
    return (
        f"dataset {name!r} (dataloader.{split}.dataset.names) is not registered{hint}; correct "
        "the name, register it with lite_detr.data.coco.register_coco(name, json_file, "
        f"image_root) in the config file, or give {list_settings(SETTINGS_OF[split])} instead"
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
                f"or give the paths of your own files with {list_settings(SETTINGS_OF['train'])} "
                "(for evaluation only the last two)"
            )


def _explain_source(metadata):
    """Return where a dataset comes from, if it was registered with that information."""
    source = metadata.get("source")
    return f"{source}, " if source else ""


def _explain_location(path):
    """Return how to move a path that lies in the folder of Detectron2's built-in datasets."""
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


def _check_num_classes(name, found, num_classes):
    if found != num_classes:
        raise DatasetError(
            f"dataset {name!r} has {found} classes but model.num_classes is {num_classes}; "
            f"set model.num_classes={found} or name a dataset with {num_classes} classes"
        )


def _check_same_classes(names):
    """Refuse datasets whose classes have other names or another order: numbers stand for them."""
    known = {name: MetadataCatalog.get(name).get("thing_classes") for name in names}
    known = {name: list(classes) for name, classes in known.items() if classes is not None}
    for name, classes in known.items():
        first, expected = next(iter(known.items()))
        for number, (given, wanted) in enumerate(zip(classes, expected)):
            if given != wanted:
                raise DatasetError(
                    f"datasets {first!r} and {name!r} must have the same classes in the same "
                    f"order, but class {number} is {wanted!r} in one and {given!r} in the other"
                )
