"""The mapper of the lazy configs: Detectron2's, with a defined result for an unusable image."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image as read_labels
from detectron2.structures import BoxMode

from ..errors import ImageError
from .image_files import TOO_THIN, read_record
from .masks import draw_classes

# The side of the black square that stands for an image in evaluation, in pixels.
STAND_IN_SIDE = 32


class DetectionInput(T.AugInput):
    """Detectron2's input of augmentations, whose class map is drawn once an augmentation asks.

    Args:
        image: ``[H, W, C]``.
        boxes: of the objects, ``[N, 4]``, corners in pixels; None if there are no annotations.
        draw_sem_seg: returns the class of each pixel of the given image, ``[H, W]``; None if
            there are no annotations.
    """

    def __init__(
        self,
        image: np.ndarray,
        boxes: np.ndarray | None = None,
        draw_sem_seg: Callable[[], np.ndarray] | None = None,
    ):
        self._applied: list[T.Transform] = []
        self._draw_sem_seg = draw_sem_seg
        super().__init__(image, boxes=boxes)

    @property
    def sem_seg(self) -> np.ndarray | None:
        if self._sem_seg is None and self._draw_sem_seg is not None:
            self._sem_seg = T.TransformList(self._applied).apply_segmentation(self._draw_sem_seg())
        return self._sem_seg

    @sem_seg.setter
    def sem_seg(self, value: np.ndarray | None) -> None:
        self._sem_seg = value

    def transform(self, tfm: T.Transform) -> None:
        self.image = tfm.apply_image(self.image)
        if self.boxes is not None:
            self.boxes = tfm.apply_box(self.boxes)
        if self._sem_seg is not None:
            self._sem_seg = tfm.apply_segmentation(self._sem_seg)
        self._applied.append(tfm)


class DetectionMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper`` for detection; its arguments and ``from_config`` are the same.

    Images are read by :func:`read_record`. In training, augmentations that ask for boxes or for
    the class of each pixel (``sem_seg``) get them: those of the objects that are not crowd
    regions. Proposals are not read.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            dataset_dict: a record in Detectron2's format.

        Returns:
            The record with ``image`` (``[C, H, W]``), and in training ``instances`` in place of
            ``annotations``. In evaluation an unusable image is a black square with the reason as
            ``unusable``; :class:`DetectionEvaluator` counts it as an image without detections.

        Raises:
            ImageError: in training, where :func:`build_train_loader` replaces the image.
        """
        sample = copy.deepcopy(dataset_dict)
        try:
            image = read_record(sample, self.image_format)
            sample.setdefault("height", image.shape[0])
            sample.setdefault("width", image.shape[1])
            sample["image"], transforms = self.augment(image, sample if self.is_train else None)
        except ImageError as error:
            if self.is_train:
                raise
            return self._stand_in(sample, str(error))
        if not self.is_train:
            sample.pop("annotations", None)
        elif "annotations" in sample:
            self._transform_annotations(sample, transforms, sample["image"].shape[1:])
        return sample

    def augment(
        self, image: np.ndarray, record: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, T.TransformList]:
        """Apply the augmentations to an image.

        Args:
            image: ``[H, W, C]``.
            record: its ``annotations`` are what augmentations may ask for; None if there are none.

        Returns:
            The image, ``[C, H, W]``, and the transforms that were applied.

        Raises:
            ImageError: resizing leaves nothing of a side.
        """
        height, width = image.shape[:2]
        augmented = make_input(image, record)
        try:
            transforms = self.augmentations(augmented)
        except (RuntimeError, ValueError) as error:
            # The words of Pillow and of PyTorch for a size of zero.
            if "must be > 0" not in str(error) and "greater than 0" not in str(error):
                raise
            raise ImageError(
                TOO_THIN, f"nothing is left of one side of its {width} x {height} pixels"
            ) from error
        # Copied, as Pillow's memory is read-only and augmentations leave negative strides.
        return torch.from_numpy(augmented.image.transpose(2, 0, 1).copy()), transforms

    def _stand_in(self, sample: dict[str, Any], reason: str) -> dict[str, Any]:
        channels = 1 if self.image_format == "L" else 3
        sample.pop("annotations", None)
        sample["image"] = torch.zeros(channels, STAND_IN_SIDE, STAND_IN_SIDE, dtype=torch.uint8)
        sample["unusable"] = reason
        return sample


def make_input(image: np.ndarray, record: dict[str, Any] | None) -> DetectionInput:
    """Return the input of augmentations for an image and a record's objects, without crowds."""
    if record is None or "annotations" not in record:
        return DetectionInput(image)
    objects = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
    boxes = corner_boxes(objects)

    def draw_sem_seg() -> np.ndarray:
        if "sem_seg_file_name" in record:
            return read_labels(record["sem_seg_file_name"], "L").squeeze(2)
        return draw_classes(objects, boxes, image.shape[:2])

    return DetectionInput(image, boxes, draw_sem_seg)


def corner_boxes(annotations: Sequence[dict]) -> np.ndarray:
    """Return the boxes of annotations, ``[N, 4]`` float64, as corners in pixels."""
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)
