"""Trained detectors that run on image files and videos, one at a time or in batches."""

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import build_detection_test_loader
from detectron2.data.detection_utils import convert_image_to_rgb, convert_PIL_to_numpy
from detectron2.data.transforms import Augmentation
from detectron2.structures import Instances
from omegaconf import DictConfig
from PIL import Image
from torch import nn

from .. import overrides
from ..checkpoint import DetrCheckpointer
from ..data.coco import apply_data_config, class_metadata
from ..data.image_files import read_image, read_record
from ..data.mapper import DetectionMapper
from ..errors import DatasetError, WeightsError
from .optimize import optimize_for_program
from .tta import add_tta
from .video import Frame

logger = logging.getLogger("lite_detr")

# The number of batches whose images are decoded before the next batch is chosen. With more to
# choose from, fewer batches stay incomplete.
BATCHES_AHEAD = 4


def load_trained_config(
    config_file: str, weights: str | None = None, opts: Sequence[str] = ()
) -> DictConfig:
    """Load the lazy config of a trained detector, with the dataset of ``data`` registered.

    Args:
        config_file: see :func:`lite_detr.model_zoo.get_config`.
        weights: becomes ``train.init_checkpoint``; None keeps the config's.
        opts: overrides, ``key=value``.

    Raises:
        MissingFileError: there is no such config.
        ConfigError: it is a YAML file, or an override does not fit it.
        DatasetError: an override of ``data`` gives a dataset that cannot be used.
        WeightsError: neither ``weights`` nor the config names weights.
    """
    cfg = overrides.load_config(config_file, opts)
    try:
        apply_data_config(cfg, splits=("test",))
    except DatasetError as error:
        if any(override.lstrip("+").startswith("data.") for override in opts):
            raise
        # The config of a run is also used where its dataset is not.
        logger.warning("%s. The names of the classes are those in the weights", error)
    if weights:
        cfg.train.init_checkpoint = weights
    if not cfg.train.init_checkpoint:
        raise WeightsError(
            f"config {config_file} names no weights: give those of a trained detector with "
            "--weights FILE"
        )
    return cfg


def build_trained_model(cfg: DictConfig) -> nn.Module:
    """Build the config's detector for inference, with the weights of ``train.init_checkpoint``."""
    model = instantiate(cfg.model).to(cfg.train.device).eval()
    DetrCheckpointer(model).load(cfg.train.init_checkpoint)
    return model


class TrainedDetector:
    """A trained detector that reads images as its test set's mapper does, and predicts them.

    Args:
        cfg: lazy config; ``train.init_checkpoint`` gives the weights.
        threshold: detections with a lower score are dropped.
        optimize: name of a dtype for :func:`lite_detr.optimize_for_inference`; None disables it.

    Attributes:
        metadata: Detectron2's, with the names of the classes, see :func:`class_metadata`; None if
            they are unknown.
    """

    def __init__(self, cfg: DictConfig, threshold: float = 0.0, optimize: str | None = None):
        self.threshold = threshold
        self.model = build_trained_model(cfg)
        self.metadata = class_metadata(cfg, getattr(self.model, "class_names", None))
        if optimize:
            self.model = optimize_for_program(self.model, optimize)
        self.model = add_tta(cfg, self.model).eval()
        mapper = instantiate(cfg.dataloader.test.mapper)
        self.augmentations, self.image_format = mapper.augmentations, mapper.image_format
        self.mapper = make_mapper([self.augmentations], self.image_format)

    def read_rgb(self, path: str | Path) -> np.ndarray:
        """Return the upright RGB image ``[H, W, 3]`` of a file."""
        return convert_image_to_rgb(read_image(str(path), self.image_format), self.image_format)

    def read(self, path: str | Path) -> tuple[np.ndarray, dict]:
        """Return the RGB image ``[H, W, 3]`` of a file, and the model's input made of it."""
        image = read_record({"file_name": str(path)}, self.image_format)
        height, width = image.shape[:2]
        inputs = {"image": self.mapper.augment(image)[0], "height": height, "width": width}
        return convert_image_to_rgb(image, self.image_format), inputs

    @torch.no_grad()
    def predict(self, inputs: dict) -> Instances:
        """Return the detections of one of the model's inputs, on the CPU, best first."""
        return self.drop_unsure(self.model([inputs])[0]["instances"].to("cpu"))

    def predict_files(
        self, paths: Iterable[str | Path], batch_size: int = 1, num_workers: int = 0
    ) -> Iterator["FilePrediction"]:
        """Yield the prediction of each file, in order; see :class:`BatchPredictor`."""
        predictor = BatchPredictor(
            self.model, [self.augmentations], self.image_format, batch_size, num_workers
        )
        for prediction in predictor(paths):
            if prediction.instances is not None:
                prediction = dataclasses.replace(
                    prediction,
                    instances=self.drop_unsure(prediction.instances),
                    best_score=best_score(prediction.instances),
                )
            yield prediction

    def predict_frames(
        self, frames: Iterable[Frame], batch_size: int = 1
    ) -> Iterator["FramePrediction"]:
        """Yield the prediction of each frame of a video, in order."""
        frames = iter(frames)
        while batch := list(itertools.islice(frames, batch_size)):
            images = [convert_image_to_rgb(frame.image, "BGR") for frame in batch]
            for frame, instances in zip(batch, self.predict_images(images)):
                yield FramePrediction(frame, self.drop_unsure(instances), best_score(instances))

    @torch.no_grad()
    def predict_images(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Return all detections of RGB images ``[H, W, 3]`` of one size, whatever their scores."""
        outputs = self.model([self.image_input(image) for image in images])
        return [output["instances"].to("cpu") for output in outputs]

    def image_input(self, rgb: np.ndarray) -> dict:
        """Return the model's input made of an RGB image ``[H, W, 3]``."""
        image = convert_PIL_to_numpy(Image.fromarray(rgb), self.image_format)
        height, width = image.shape[:2]
        return {"image": self.mapper.augment(image)[0], "height": height, "width": width}

    def drop_unsure(self, instances: Instances) -> Instances:
        """Return the detections whose score reaches the threshold."""
        return instances[instances.scores >= self.threshold]


@dataclass(frozen=True)
class FilePrediction:
    """The detections in an image file, or the reason why there are none.

    Attributes:
        path: as it was given.
        instances: on the CPU, with boxes in pixels of the upright image; None if the file cannot
            be used.
        problem: why the file cannot be used; None if it can.
        best_score: of all detections, also of those that a threshold has dropped; None if there
            was none.
    """

    path: Path
    instances: Instances | None = None
    problem: str | None = None
    best_score: float | None = None


@dataclass(frozen=True)
class FramePrediction:
    """The detections in a frame of a video; see :class:`FilePrediction`."""

    frame: Frame
    instances: Instances
    best_score: float | None


def best_score(instances: Instances) -> float | None:
    return instances.scores.max().item() if len(instances) else None


class BatchPredictor:
    """Run a detector over many image files, as Detectron2's ``DefaultPredictor`` does over one.

    Only images of the same size after resizing share a batch, so that each gets the result that it
    gets alone. Padding would change it: attention ignores it, but convolutions and norms do not,
    and the cells of coarse maps do not end where the image ends.

    Args:
        model: any of Detectron2's models; it is put into evaluation mode.
        augmentations: resize the images, as those of the config's test set do.
        image_format: the order of channels that the model expects, "RGB" or "BGR".
        batch_size: the largest number of images to predict at once.
        num_workers: processes that decode and resize while the model runs; with 0, the calling
            process does so before each batch.

    Raises:
        ValueError: ``batch_size`` or ``num_workers`` is too small.
    """

    def __init__(
        self,
        model: nn.Module,
        augmentations: Sequence[Augmentation],
        image_format: str,
        batch_size: int = 1,
        num_workers: int = 0,
    ):
        for name, given, minimum in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if given < minimum:
                raise ValueError(f"{name} is {given}, accepted are numbers from {minimum} on")
        self.model = model.eval()
        self.mapper = make_mapper(augmentations, image_format)
        self.batch_size = batch_size
        self.num_workers = num_workers

    def __call__(self, paths: Iterable[str | Path]) -> Iterator[FilePrediction]:
        """Yield the prediction of each file, in the given order, while the next ones are read.

        Raises:
            TypeError: a single path is given.
        """
        if isinstance(paths, (str, Path)):
            raise TypeError(f"a predictor takes a list of files, got {paths!r}: give [{paths!r}]")
        return self._in_order(list(paths))

    def _in_order(self, paths: list[str | Path]) -> Iterator[FilePrediction]:
        finished: dict[int, FilePrediction] = {}
        position = 0
        for index, prediction in self._as_ready(paths):
            finished[index] = prediction
            while position in finished:
                yield finished.pop(position)
                position += 1

    def _as_ready(self, paths: list[str | Path]) -> Iterator[tuple[int, FilePrediction]]:
        """Yield predictions as they are ready, each with the position of its path."""
        if not paths:
            return
        loader = build_detection_test_loader(
            [{"file_name": str(path), "position": i} for i, path in enumerate(paths)],
            mapper=self.mapper,
            num_workers=min(self.num_workers, len(paths)),
        )
        max_waiting = BATCHES_AHEAD * (self.batch_size - 1) + 1
        waiting: list[dict] = []
        for (sample,) in loader:
            if "unusable" in sample:
                index = sample["position"]
                yield index, FilePrediction(Path(paths[index]), problem=sample["unusable"])
                continue
            waiting.append(sample)
            if len(waiting) == max_waiting:
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


def make_mapper(augmentations: Sequence[Augmentation], image_format: str) -> DetectionMapper:
    """Return a mapper of images without annotations."""
    return DetectionMapper(
        is_train=False, augmentations=list(augmentations), image_format=image_format
    )


def split_batch(waiting: Sequence[dict], batch_size: int) -> tuple[list[dict], list[dict]]:
    """Split off the first sample with others of its size; return the batch and the rest."""
    batch, rest = [], []
    for sample in waiting:
        fits = sample["image"].shape == waiting[0]["image"].shape
        (batch if fits and len(batch) < batch_size else rest).append(sample)
    return batch, rest
