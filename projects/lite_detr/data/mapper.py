"""The mapper of the lazy configs: Detectron2's, which says what becomes of an unusable image."""

import copy
from typing import Any

import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

from .image_files import ImageError, read_record

# The side of the black square that stands for an image in evaluation, in pixels.
STAND_IN_SIDE = 32


class DetectionMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper`` for detection; its arguments and ``from_config`` are the same.

    Images are read by :func:`read_record`. Proposals and semantic masks, which no detector of ours
    takes, are not read.
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
            ImageError: in training, where :func:`build_train_loader` puts another image in its
                place.
        """
        sample = copy.deepcopy(dataset_dict)
        try:
            image = read_record(sample, self.image_format)
        except ImageError as error:
            if self.is_train:
                raise
            return self._stand_in(sample, str(error))
        sample.setdefault("height", image.shape[0])
        sample.setdefault("width", image.shape[1])

        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        height, width = augmented.image.shape[:2]
        # Copied, as Pillow's memory is read-only and augmentations leave negative strides.
        sample["image"] = torch.from_numpy(augmented.image.transpose(2, 0, 1).copy())
        if not self.is_train:
            sample.pop("annotations", None)
        elif "annotations" in sample:
            self._transform_annotations(sample, transforms, (height, width))
        return sample

    def _stand_in(self, sample: dict[str, Any], reason: str) -> dict[str, Any]:
        channels = 1 if self.image_format == "L" else 3
        sample.pop("annotations", None)
        sample["image"] = torch.zeros(channels, STAND_IN_SIDE, STAND_IN_SIDE, dtype=torch.uint8)
        sample["unusable"] = reason
        return sample
