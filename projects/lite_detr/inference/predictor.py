"""Predictions for many image files: decoded ahead by processes, in batches of one size."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.data import build_detection_test_loader
from detectron2.data.transforms import Augmentation
from detectron2.structures import Instances
from torch import nn

from ..data.mapper import DetectionMapper

# So many batches' images are decoded before the next batch is chosen: the more, the fuller it is.
BATCHES_AHEAD = 4


@dataclass(frozen=True)
class FilePrediction:
    """What became of an image file.

    Attributes:
        path: as it was given.
        instances: on the CPU, with boxes in the pixels of the file's image, upright; None for a
            file that cannot be used.
        problem: why it cannot; None for all others.
    """

    path: Path
    instances: Instances | None = None
    problem: str | None = None


class BatchPredictor:
    """Runs a detector over image files, as Detectron2's ``DefaultPredictor`` does over one image.

    Images share a batch if they have one size once they are resized, so that each gets what it
    gets alone. With padding it would not: attention does not see it, but convolutions and norms
    do, and the cells of coarse maps do not end where the image ends.

    Args:
        model: any of Detectron2's models; it is put into evaluation mode.
        augmentations: what resizes the images, such as those of the config's test set.
        image_format: the order of channels that the model takes, "RGB" or "BGR".
        batch_size: at most so many images are predicted at once.
        num_workers: processes that decode and resize while the model runs; with 0, the caller's
            process does so itself, before each batch.

    Raises:
        ValueError: ``batch_size`` or ``num_workers`` is too small a number.
    """

    def __init__(
        self,
        model: nn.Module,
        augmentations: Sequence[Augmentation],
        image_format: str,
        batch_size: int = 1,
        num_workers: int = 0,
    ):
        for name, given, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if given < least:
                raise ValueError(f"{name} is {given}, accepted are numbers from {least} on")
        self.model = model.eval()
        self.mapper = DetectionMapper(
            is_train=False, augmentations=list(augmentations), image_format=image_format
        )
        self.batch_size = batch_size
        self.num_workers = num_workers

    def __call__(self, paths: Iterable[str | Path]) -> Iterator[FilePrediction]:
        """Yields what becomes of each file, in the given order, while the next ones are read.

        Raises:
            TypeError: a single path is given.
        """
        if isinstance(paths, (str, Path)):
            raise TypeError(f"a predictor takes a list of files, got {paths!r}: give [{paths!r}]")
        return self._in_order(list(paths))

    def _in_order(self, paths: list[str | Path]) -> Iterator[FilePrediction]:
        finished: dict[int, FilePrediction] = {}
        position = 0
        for index, prediction in self._as_they_come(paths):
            finished[index] = prediction
            while position in finished:
                yield finished.pop(position)
                position += 1

    def _as_they_come(self, paths: list[str | Path]) -> Iterator[tuple[int, FilePrediction]]:
        """Predictions with the positions of their paths."""
        if not paths:
            return
        loader = build_detection_test_loader(
            [{"file_name": str(path), "position": i} for i, path in enumerate(paths)],
            mapper=self.mapper,
            num_workers=min(self.num_workers, len(paths)),
        )
        enough = BATCHES_AHEAD * (self.batch_size - 1) + 1
        waiting: list[dict] = []
        for (sample,) in loader:
            if "unusable" in sample:
                index = sample["position"]
                yield index, FilePrediction(Path(paths[index]), problem=sample["unusable"])
                continue
            waiting.append(sample)
            if len(waiting) == enough:
                batch, waiting = split_batch(waiting, self.batch_size)
                yield from self._predict(batch)
        while waiting:
            batch, waiting = split_batch(waiting, self.batch_size)
            yield from self._predict(batch)

    @torch.no_grad()
    def _predict(self, batch: list[dict]) -> list[tuple[int, FilePrediction]]:
        return [
            (
                sample["position"],
                FilePrediction(Path(sample["file_name"]), output["instances"].to("cpu")),
            )
            for sample, output in zip(batch, self.model(batch))
        ]


def split_batch(waiting: Sequence[dict], batch_size: int) -> tuple[list[dict], list[dict]]:
    """The first of some samples with others of its size, and those that are left."""
    batch, rest = [], []
    for sample in waiting:
        alike = sample["image"].shape == waiting[0]["image"].shape
        (batch if alike and len(batch) < batch_size else rest).append(sample)
    return batch, rest
