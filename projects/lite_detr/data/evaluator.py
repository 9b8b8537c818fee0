"""COCO's and LVIS's evaluation, in which an unusable image has no detections."""

import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest import mock

import numpy as np
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    coco_evaluation,
)
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch.utils.data import Dataset, IterableDataset

from ..errors import DatasetError, MissingPackageError
from ..labels import printable
from .coco_file import box_area, has_usable_area, is_sound_box, load_json, records_to_coco

logger = logging.getLogger("lite_detr")

MAX_NAMED = 5
# Types of Detectron2 whose datasets COCO's metrics do not measure, and the evaluators that do.
OTHER_EVALUATORS = {"lvis": "lite_detr.data.evaluator.LVISDetectionEvaluator"}


class UnusableImages(DatasetEvaluator):
    """Counts images that :class:`DetectionMapper` marks as unusable, for an evaluator.

    They are images without detections, so that their objects are missed: a broken file never makes
    a result better. A warning names the files, and the results hold their number as
    ``{"unusable": {"images": number}}``.
    """

    distributed: bool

    def reset(self):
        super().reset()
        self.unusable: list[tuple[str, str]] = []

    def process(self, inputs, outputs):
        kept = []
        for sample, output in zip(inputs, outputs):
            if "unusable" in sample:
                self.unusable.append((sample["file_name"], sample["unusable"]))
                output = output | {"instances": output["instances"][:0]}
            kept.append(output)
        super().process(inputs, kept)

    def evaluate(self, *args, **kwargs):
        unusable = comm.gather(self.unusable) if self.distributed else [self.unusable]
        results = super().evaluate(*args, **kwargs)
        # Only the main process has what the others gathered.
        unusable = sorted(entry for entries in unusable for entry in entries)
        if unusable:
            listed = [f"{printable(name)}: {reason}" for name, reason in unusable[:MAX_NAMED]]
            listed += ["..."] if len(unusable) > MAX_NAMED else []
            logger.warning(
                "%d image(s) are unusable and count as images without detections, whose objects "
                "are missed:%s",
                len(unusable),
                "".join(f"\n  {line}" for line in listed),
            )
            results["unusable"] = {"images": len(unusable)}
        return results


class DetectionEvaluator(UnusableImages, COCOEvaluator):
    """Detectron2's ``COCOEvaluator``, on ground truth that COCO's code takes as it is meant.

    It evaluates every dataset of Detectron2's catalog whose records have boxes, also those that a
    function gives; see :func:`load_ground_truth`. The annotation file is read again for each
    evaluator, never from a cache.

    Unusable images count as :class:`UnusableImages` says.

    Args:
        dataset_name: a name of Detectron2's catalog.
        tasks, distributed, output_dir, **options: see ``COCOEvaluator``.
        use_fast_impl: True computes the same figures with faster-coco-eval, unless Detectron2 has
            its own compiled evaluation; False computes them with pycocotools, None with
            Detectron2's own if it has that.

    Raises:
        DatasetError: the dataset cannot be evaluated.
        MissingPackageError: faster-coco-eval is not installed.
    """

    def __init__(
        self,
        dataset_name,
        tasks=None,
        distributed=True,
        output_dir=None,
        *,
        use_fast_impl: bool | None = None,
        **options,
    ):
        has_own = coco_evaluation.COCOeval_opt is not coco_evaluation.COCOeval
        self.uses_faster_coco_eval = bool(use_fast_impl) and not has_own
        if use_fast_impl is None:
            use_fast_impl = has_own
        options["use_fast_impl"] = use_fast_impl
        self.distributed = distributed
        content, metadata = load_ground_truth(dataset_name)
        # Detectron2 reads ground truth from a file, whose name it takes from a dataset's metadata.
        name = f"{dataset_name}, ground truth of an evaluator"
        MetadataCatalog.pop(name, None)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "ground_truth.json")
            with open(path, "w", encoding="ascii") as file:
                json.dump(content, file)
            MetadataCatalog.get(name).set(json_file=path, **metadata)
            with self.evaluation():
                super().__init__(name, tasks, distributed, output_dir, **options)
        MetadataCatalog.pop(name)

    def evaluation(self) -> AbstractContextManager[None]:
        """Return a context in which Detectron2 evaluates as this evaluator is told."""
        return with_faster_coco_eval() if self.uses_faster_coco_eval else nullcontext()

    def evaluate(self, img_ids=None):
        with self.evaluation():
            return super().evaluate(img_ids)


class LVISDetectionEvaluator(UnusableImages, LVISEvaluator):
    """Detectron2's ``LVISEvaluator``, with today's NumPy.

    Unusable images count as :class:`UnusableImages` says.

    Args:
        dataset_name: a name of Detectron2's catalog, whose annotation file is in LVIS's format.
        tasks, distributed, output_dir, **options: see ``LVISEvaluator``.

    Raises:
        MissingPackageError: lvis is not installed.
    """

    def __init__(self, dataset_name, tasks=None, distributed=True, output_dir=None, **options):
        try:
            import lvis  # noqa: F401
        except ModuleNotFoundError as error:
            raise MissingPackageError(
                f"LVIS's metrics need {error.name}: run `pip install lvis`"
            ) from None
        self.distributed = distributed
        super().__init__(dataset_name, tasks, distributed, output_dir, **options)

    def evaluate(self):
        # The last release of lvis, 0.5.3 of 2020, uses this name, which NumPy has dropped in 1.24.
        with mock.patch.object(np, "float", float, create=True):
            return super().evaluate()


@contextmanager
def with_faster_coco_eval() -> Iterator[None]:
    """Let Detectron2's evaluator use faster-coco-eval in place of pycocotools.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        from faster_coco_eval.core.coco import COCO
        from faster_coco_eval.core.faster_eval_api import COCOeval
    except ModuleNotFoundError:
        raise MissingPackageError(
            "use_fast_impl needs faster-coco-eval, as this Detectron2 comes without its own: run "
            "`pip install faster-coco-eval`, or leave use_fast_impl out"
        ) from None
    # Detectron2 has no argument for them. They are looked up here whenever they are used.
    with (
        mock.patch.object(coco_evaluation, "COCO", COCO),
        mock.patch.object(coco_evaluation, "COCOeval_opt", COCOeval),
        mock.patch.object(coco_evaluation, "COCOevalMaxDets", COCOeval),
    ):
        yield


def load_ground_truth(name: str) -> tuple[dict, dict]:
    """Return a dataset's COCO content for evaluation, and the metadata that go with it.

    What COCO's code would take for something else is replaced: annotations are numbered from 1
    on, as it takes the id 0 for "not found"; ``iscrowd`` is 0 where it is missing; an ``area``
    that is missing, not positive or too large becomes the area of the box, as COCO ignores
    objects of other areas.

    Args:
        name: of Detectron2's catalog. Its annotation file is read if it has one, otherwise the
            boxes of its records are used.

    Raises:
        DatasetError: the dataset is for another evaluator, or cannot be evaluated.
    """
    metadata = MetadataCatalog.get(name)
    refuse_other_evaluator(name, metadata)
    if metadata.get("json_file"):
        json_file = PathManager.get_local_path(metadata.json_file)
        content = load_json(json_file)
        source = json_file
    else:
        records = load_records(name)
        listed = (records[i] for i in range(len(records)))
        content = records_to_coco(name, listed, metadata.get("thing_classes"), "test")
        source = f"dataset {name!r}"
    categories = sorted(content.get("categories", ()), key=lambda category: category["id"])
    classes = metadata.get("thing_classes") or [category["name"] for category in categories]
    if repeated := [text for text, count in Counter(classes).items() if count > 1]:
        raise DatasetError(
            f"{source}: two categories have the name {repeated[0]!r}, so that results by class "
            "cannot be told apart; give each a name of its own"
        )
    kept = {"thing_classes": list(classes)}
    if id_map := metadata.get("thing_dataset_id_to_contiguous_id"):
        kept["thing_dataset_id_to_contiguous_id"] = id_map
    elif metadata.get("json_file"):
        ids = [category["id"] for category in categories]
        kept["thing_dataset_id_to_contiguous_id"] = {i: number for number, i in enumerate(ids)}
    # pycocotools 2.0.10 reads it.
    content.setdefault("info", {})
    if "annotations" in content:
        content["annotations"] = [
            _for_evaluation(source, number, annotation)
            for number, annotation in enumerate(content["annotations"], start=1)
        ]
    return content, kept


def refuse_other_evaluator(name: str, metadata: Metadata) -> None:
    """Raise ``DatasetError`` if COCO's metrics do not measure a dataset of the catalog."""
    if evaluator := OTHER_EVALUATORS.get(metadata.get("evaluator_type")):
        raise DatasetError(
            f"dataset {name!r} is not measured by COCO's metrics: set "
            f"dataloader.evaluator._target_={evaluator}"
        )


def _for_evaluation(source: str, number: int, annotation: dict) -> dict:
    if not is_sound_box(annotation.get("bbox")):
        raise DatasetError(
            f"{source}: annotation {annotation.get('id')} must have a 'bbox' of four finite "
            "numbers, [x, y, width, height]"
        )
    area = annotation["area"] if has_usable_area(annotation) else box_area(annotation["bbox"])
    crowd = int(bool(annotation.get("iscrowd", 0)))
    return {**annotation, "id": number, "area": area, "iscrowd": crowd}


def load_records(name: str) -> list[dict] | Dataset:
    """Return the records of a dataset of Detectron2's catalog: a list, or PyTorch's ``Dataset``.

    Raises:
        DatasetError: they cannot be loaded, or have no order.
    """
    try:
        records = DatasetCatalog.get(name)
    except OSError as error:
        raise DatasetError(f"dataset {name!r} cannot be loaded: {error}") from error
    if isinstance(records, IterableDataset):
        raise DatasetError(
            f"dataset {name!r} is a {type(records).__name__}, which is iterable-style; register a "
            "function that returns a list of records"
        )
    return records
