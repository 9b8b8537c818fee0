"""Detectron2's training loader, in which another image replaces an unusable one.

Detectron2 silently skips a sample for which its mapper returns None, and draws the next one from
each worker's random generator. Here a warning names the file, and its replacement depends on the
sample's index alone: not on the number of workers or on what was read before.
"""

import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from detectron2.config import configurable
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from detectron2.utils.serialize import PicklableWrapper
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler

from ..errors import ConfigError, DatasetError, ImageError
from ..labels import printable
from .coco_file import clip_boxes
from .faults import join_first
from .mapper import DetectionMapper
from .mixing import MixedDataset, Mixing
from .stream import SampleStream, StreamedBatches

logger = logging.getLogger("lite_detr")

MAX_UNUSABLE = 0.1


class ReplacingDataset(Dataset):
    """Mapped samples, in which another image replaces one that the mapper cannot use.

    Replacements are tried in an order that the index alone decides: first images of the same
    orientation, so that Detectron2 groups the sample as it would have grouped the unusable one.

    Args:
        records: a list of Detectron2's dicts, or a dataset that gives one for an index.
        mapper: makes a sample of a record, or raises ``ImageError``.
        max_unusable: the search for a replacement ends with more unusable images than this share
            of all.
    """

    def __init__(
        self,
        records: list[dict[str, Any]] | Dataset,
        mapper: Callable[[dict], dict],
        max_unusable: float = MAX_UNUSABLE,
    ):
        self.records = (
            DatasetFromList(records, copy=False) if isinstance(records, list) else records
        )
        self.max_unusable = max_unusable
        # So that workers that are spawned can receive a lambda, as in Detectron2's MapDataset.
        self._mapper = PicklableWrapper(mapper)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the sample of an index.

        If the image is unusable, return the sample of its replacement with ``skipped``, a list of
        (index, file name, reason). It keeps ``width`` and ``height`` of the unusable image, by
        which Detectron2 groups samples. If the search was given up, there is no ``image``.
        """
        index = int(index)
        skipped = []
        for candidate in self._candidates(index):
            record = self.records[candidate]
            try:
                sample = self._mapper(record)
            except ImageError as error:
                skipped.append((candidate, record["file_name"], str(error)))
                if len(skipped) > self.max_unusable * len(self):
                    break
            else:
                return self._with_history(sample, index, skipped) if skipped else sample
        return self._with_history({}, index, skipped)

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        is_wide = self._is_wide
        others = [i for i in range(len(self)) if i != index]
        # A separate generator: other draws would change a shared one.
        random.Random(index).shuffle(others)
        yield from sorted(others, key=lambda i: is_wide[i] != is_wide[index])

    @cached_property
    def _is_wide(self) -> list[bool]:
        return [record.get("width", 0) > record.get("height", 0) for record in self.records]

    def _with_history(self, sample: dict, index: int, skipped: list) -> dict[str, Any]:
        asked = self.records[index]
        size = {key: asked[key] for key in ("width", "height") if key in asked}
        return sample | size | {"skipped": skipped}


class WatchedBatches(IterableDataset):
    """The batches of a loader; reports skipped images when training takes their batch.

    Each unusable file gets one warning, and their number so far is the scalar
    ``unusable_images`` of Detectron2's event storage. Both are those of this process.

    Args:
        loader: yields lists of samples, and knows its position.
        num_images: the size of the dataset.
        max_unusable: the largest share of unusable images.
        collate_fn: turns the list of samples into the model's input; None keeps the list.
    """

    def __init__(
        self,
        loader: StreamedBatches,
        num_images: int,
        max_unusable: float = MAX_UNUSABLE,
        collate_fn: Callable[[list[dict]], Any] | None = None,
    ):
        self.loader = loader
        self.num_images = num_images
        self.max_unusable = max_unusable
        self.collate_fn = collate_fn
        # {index: (the file's name, what is wrong with it)}
        self.unusable: dict[int, tuple[str, str]] = {}

    def __iter__(self) -> Iterator[Any]:
        """
        Raises:
            DatasetError: more images than the largest share are unusable.
        """
        for batch in self.loader:
            for sample in batch:
                self._report(sample.pop("skipped", ()), given_up="image" not in sample)
            if self.unusable and has_event_storage():
                get_event_storage().put_scalar(
                    "unusable_images", len(self.unusable), smoothing_hint=False
                )
            yield batch if self.collate_fn is None else self.collate_fn(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, for a checkpoint: see :class:`StreamedBatches`."""
        return {"unusable": self.unusable, **self.loader.state_dict()}

    def load_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from the states of a job's processes; each has its own unusable images."""
        if len(states) == comm.get_world_size():
            self.unusable = dict(states[comm.get_rank()]["unusable"])
        self.loader.load_states(states)

    def _report(self, skipped: Iterable[tuple[int, str, str]], given_up: bool) -> None:
        for index, file_name, reason in skipped:
            if index not in self.unusable:
                self.unusable[index] = (file_name, reason)
                logger.warning(
                    "%s: %s; other images replace it in training (%d unusable of %d so far)",
                    printable(file_name),
                    reason,
                    len(self.unusable),
                    self.num_images,
                )
        if given_up or len(self.unusable) > self.max_unusable * self.num_images:
            listed = "".join(
                f"\n  {printable(name)}: {reason}" for name, reason in self.unusable.values()
            )
            raise DatasetError(
                f"{len(self.unusable)} of the {self.num_images} training images are unusable so "
                f"far, accepted are {self.max_unusable:.0%}: repair them, remove them from the "
                "annotation file, or raise dataloader.train.max_unusable. "
                f"tools/check_dataset.py lists all of them; found so far:{listed}"
            )


def check_boxes(records: list[dict[str, Any]]) -> None:
    """Warn once of the boxes that Detectron2 silently omits, with the names of their files.

    Datasets that were checked by ``register_coco`` have none. Only boxes that are a corner and a
    size, or two corners, are examined.

    Raises:
        DatasetError: the records have annotations, and none of them is an object to train on.
    """
    files, boxes, modes, sizes = [], [], [], []
    num_annotated, num_objects = 0, 0
    for record in records:
        num_annotated += "annotations" in record
        for annotation in record.get("annotations", ()):
            if annotation.get("iscrowd"):
                continue
            num_objects += 1
            mode = annotation.get("bbox_mode")
            if mode in (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS):
                files.append(record["file_name"])
                boxes.append(annotation["bbox"])
                modes.append(mode == BoxMode.XYXY_ABS)
                sizes.append([record.get("width", np.inf), record.get("height", np.inf)])
    lost = []
    if boxes:
        boxes, is_corners = np.array(boxes, dtype=np.float64), np.array(modes)
        boxes[is_corners, 2:] -= boxes[is_corners, :2]
        with np.errstate(invalid="ignore"):
            usable = clip_boxes(boxes, np.array(sizes, dtype=np.float64))[1]
        lost = list(itertools.compress(files, ~usable))
    if num_annotated and num_objects == len(lost):
        raise DatasetError(
            f"none of the {len(records)} training images has an object with an area that is not a "
            "crowd region: there is nothing to train on; see dataloader.train.dataset"
        )
    if lost:
        logger.warning(
            "%d box(es) of NaN, or without an area inside their image, ignored in training: in %s",
            len(lost),
            join_first(list(dict.fromkeys(lost)), 5),
        )


def repeat_factors(records: list[dict[str, Any]] | Dataset, threshold: float) -> Tensor:
    """Return how often each image is in an epoch, on average: Detectron2's repeat factors of LVIS.

    A class that a share f of the images have asks for max(1, sqrt(threshold / f)), and an image for
    the largest number of its classes. Crowd regions do not count.

    Raises:
        ConfigError: the threshold is not above 0 and at most 1, or the records are not a list.
    """
    if not isinstance(records, list) or not 0 < threshold <= 1:
        raise ConfigError(
            f"dataloader.train.repeat_threshold={threshold}: accepted are shares of the images, "
            "above 0 and at most 1, with a dataset that is a list of dicts"
        )
    objects = [
        {"annotations": [a for a in record.get("annotations", ()) if not a.get("iscrowd")]}
        for record in records
    ]
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(objects, threshold)
    logger.info(
        "repeat_threshold=%g: %d of %d images are seen more often, up to %.1f times",
        threshold,
        int((factors > 1).sum()),
        len(factors),
        factors.max().item(),
    )
    return factors


def _from_config(cfg, mapper=None, **kwargs) -> dict[str, Any]:
    mapper = DetectionMapper(cfg, is_train=True) if mapper is None else mapper
    return build_detection_train_loader.from_config(cfg, mapper, **kwargs)


@configurable(from_config=_from_config)
def build_train_loader(
    dataset: list[dict] | Dataset,
    *,
    mapper: Callable[[dict], dict],
    total_batch_size: int,
    sampler: Sampler | None = None,
    aspect_ratio_grouping: bool = True,
    max_unusable: float = MAX_UNUSABLE,
    repeat_threshold: float | None = None,
    mixing: Mixing | None = None,
    collate_fn: Callable[[list[dict]], Any] | None = None,
    **kwargs,
) -> WatchedBatches:
    """Build Detectron2's ``build_detection_train_loader``, in which unusable images are replaced.

    A training run that is interrupted continues after the last batch that it took, and
    augmentations depend on an image's place in the stream alone: see :class:`SampleStream`.

    Like that function it also accepts a YAML config: ``build_train_loader(cfg)``.

    Args:
        dataset: Detectron2's dicts, or a dataset of them that is not iterable-style.
        mapper: a :class:`DetectionMapper`, or another that raises ``ImageError``.
        sampler: as Detectron2's; the order of its indices must be the same in each new start.
        max_unusable: the share of unusable images above which training stops.
        repeat_threshold: images with classes that fewer than this share of the images have are
            seen more often, see :func:`repeat_factors`; None: all are seen alike.
        mixing: combines several images in one for a first share of the training run; None: never.
        collate_fn: applied to the list of samples, in the training process.
        total_batch_size, aspect_ratio_grouping, **kwargs: see ``build_detection_train_loader``.

    Raises:
        TypeError: the dataset is iterable-style, so that no replacement can be chosen.
        DatasetError: the dataset has annotations, but no object to train on; or ``mixing`` has only
            one image.
        ConfigError: ``repeat_threshold`` is not a share, or there is a ``sampler`` as well.
    """
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"the dataset is a {type(dataset).__name__}, which is iterable-style; accepted are "
            "lists of dicts and datasets with an index, because a replacement is found by its "
            "index: use detectron2.data.build_detection_train_loader for it"
        )
    if isinstance(dataset, list):
        check_boxes(dataset)
    factors = None
    if repeat_threshold is not None:
        if sampler is not None:
            raise ConfigError(
                "dataloader.train has a sampler and repeat_threshold: set one to null"
            )
        factors = repeat_factors(dataset, repeat_threshold)
    dataset = ReplacingDataset(dataset, mapper, max_unusable)
    batch_size = total_batch_size // comm.get_world_size()
    mixed, num_mixed = None, 0
    if mixing is not None:
        mixed = MixedDataset(dataset, mixing.combinations)
        num_mixed = mixing.num_batches * batch_size
    # If images are grouped, workers yield single ones, otherwise whole batches.
    chunk_size = 1 if aspect_ratio_grouping else batch_size
    stream = SampleStream(dataset, sampler, chunk_size, factors, mixed, num_mixed)
    loader = build_detection_train_loader(
        stream,
        mapper=None,
        total_batch_size=total_batch_size,
        aspect_ratio_grouping=aspect_ratio_grouping,
        **kwargs,
    )
    batches = StreamedBatches(loader, stream)
    return WatchedBatches(batches, len(dataset), max_unusable, collate_fn)
