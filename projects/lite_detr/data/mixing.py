"""Several training images in one: mosaic and mixup, for a first share of a training run.

Pictures with more objects give a detector's one-to-one matching more pairs to learn from
(arXiv 2412.04234). Neither Detectron2 nor torchvision has them for boxes. They combine samples that
the mapper has augmented, and draw from the generators that are seeded for each place in the stream;
so a training run that is interrupted goes on with the same pictures.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ConfigError, DatasetError

Sample = dict[str, Any]


class Picture(NamedTuple):
    """An image with its objects.

    Attributes:
        image: ``[C, H, W]``
        boxes: ``[N]``, corners in pixels.
        classes: ``[N]``
    """

    image: Tensor
    boxes: Boxes
    classes: Tensor


class Mosaic:
    """Four images around a random point, in a picture of the first one's size.

    Each is resized and cropped at random to its quarter. What it does not fill is grey.

    Args:
        prob: the share of samples that become mosaics.
        scale: the range of the factors of resizing.
        centre: the range of the point, as shares of width and height.
        min_visible: objects of which less than this share of the area remains are dropped, and
            those of which a pixel or less of a side remains.
        grey: the value of pixels without an image.
    """

    num_images = 4

    def __init__(
        self,
        prob: float = 0.5,
        scale: tuple[float, float] = (0.5, 1.0),
        centre: tuple[float, float] = (0.3, 0.7),
        min_visible: float = 0.1,
        grey: int = 114,
    ):
        check_share("Mosaic", "prob", prob)
        check_share("Mosaic", "min_visible", min_visible)
        if not 0 < scale[0] <= scale[1] or not 0 <= centre[0] <= centre[1] <= 1:
            raise ConfigError(
                f"Mosaic has scale={tuple(scale)} and centre={tuple(centre)}: accepted are two "
                "rising numbers, above 0 and from 0 to 1"
            )
        self.prob, self.scale, self.centre = prob, scale, centre
        self.min_visible, self.grey = min_visible, grey

    def __call__(self, pictures: Sequence[Picture]) -> Picture:
        image = torch.full_like(pictures[0].image, self.grey)
        height, width = image.shape[1:]
        x, y = (round(side * np.random.uniform(*self.centre)) for side in (width, height))
        boxes, classes = [], []
        quarters = ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
        for picture, (left, top, right, bottom) in zip(pictures, quarters):
            size = bottom - top, right - left
            if 0 in size:
                continue
            part = self._crop(resize(picture, np.random.uniform(*self.scale)), size)
            # A part that is too small for its quarter touches the point.
            h, w = part.image.shape[1:]
            left, top = right - w if left == 0 else left, bottom - h if top == 0 else top
            image[:, top : top + h, left : left + w] = part.image
            boxes.append(shift(part.boxes, left, top))
            classes.append(part.classes)
        return Picture(image, Boxes.cat(boxes), torch.cat(classes))

    def _crop(self, picture: Picture, size: tuple[int, int]) -> Picture:
        """Crop at random to at most a size, height and width."""
        height, width = map(min, picture.image.shape[1:], size)
        top, left = (
            np.random.randint(side - rest + 1)
            for side, rest in zip(picture.image.shape[1:], (height, width))
        )
        boxes = shift(picture.boxes, -left, -top)
        areas = boxes.area()
        boxes.clip((height, width))
        kept = boxes.nonempty(threshold=1.0) & (boxes.area() >= self.min_visible * areas)
        image = picture.image[:, top : top + height, left : left + width]
        return Picture(image, boxes[kept], picture.classes[kept])


class MixUp:
    """Two images on top of each other: the second, resized to fit into the first, shines through.

    The objects of both count in full.

    Args:
        prob: the share of samples that are mixed.
        weight: the range of the first image's weight.
    """

    num_images = 2

    def __init__(self, prob: float = 0.5, weight: tuple[float, float] = (0.45, 0.55)):
        check_share("MixUp", "prob", prob)
        if not 0 < weight[0] <= weight[1] < 1:
            raise ConfigError(
                f"MixUp has weight={tuple(weight)}: accepted are two rising numbers between 0 and 1"
            )
        self.prob, self.weight = prob, weight

    def __call__(self, pictures: Sequence[Picture]) -> Picture:
        first, second = pictures
        sides = first.image.shape[1:]
        second = resize(
            second, min(side / other for side, other in zip(sides, second.image.shape[1:]))
        )
        height, width = second.image.shape[1:]
        top = np.random.randint(sides[0] - height + 1)
        left = np.random.randint(sides[1] - width + 1)
        image = first.image.clone()
        below = image[:, top : top + height, left : left + width]
        weight = np.random.uniform(*self.weight)
        mixed = weight * below.float() + (1 - weight) * second.image.float()
        below.copy_(mixed if image.is_floating_point() else mixed.round())
        boxes = shift(second.boxes, left, top)
        boxes.clip(sides)
        kept = boxes.nonempty(threshold=1.0)
        return Picture(
            image,
            Boxes.cat([first.boxes, boxes[kept]]),
            torch.cat([first.classes, second.classes[kept]]),
        )


class Mixing:
    """The combinations of images in a training run, and how long they last.

    The detector ends on pictures such as it will see, so the rest of the run has none.

    Args:
        combinations: each combines what those before it give.
        num_iters: iterations of the training run, ``"${train.max_iter}"``.
        accumulation: batches of an iteration, ``"${train.accumulation}"``.
        share: the first share of the iterations, which has combinations.

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(
        self,
        combinations: Sequence[Callable[[Sequence[Picture]], Picture]],
        num_iters: int,
        accumulation: int = 1,
        share: float = 0.5,
    ):
        check_share("dataloader.train.mixing", "share", share)
        self.combinations = list(combinations)
        self.num_batches = round(share * num_iters) * accumulation


class MixedDataset(Dataset):
    """Samples of a dataset, combined with others that are drawn from all of it.

    Args:
        dataset: of samples with ``image`` and ``instances``, or without ``image`` where none of
            their images can be used.
        combinations: see :class:`Mixing`.

    Raises:
        DatasetError: there is only one image.
    """

    def __init__(
        self, dataset: Dataset, combinations: Sequence[Callable[[Sequence[Picture]], Picture]]
    ):
        if len(dataset) < 2:
            raise DatasetError(
                "dataloader.train.mixing combines several images, and the training set has "
                f"{len(dataset)}: set it to null, or give a dataset of 2 images or more"
            )
        self.dataset, self.combinations = dataset, combinations

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        """Return the sample of an index with the combined ``image`` and ``instances``.

        Its other entries are its own, but ``skipped``, which lists the unusable images of all.
        """
        return self._read(int(index), len(self.combinations))

    def _read(self, index: int, count: int) -> Sample:
        """Return a sample after the first combinations."""
        if count == 0:
            return self.dataset[index]
        combination = self.combinations[count - 1]
        if np.random.rand() >= combination.prob:
            return self._read(index, count - 1)
        others = np.random.randint(1, len(self), combination.num_images - 1)
        indices = [index, *((index + others) % len(self)).tolist()]
        samples = [self._read(i, count - 1) for i in indices]
        skipped = [entry for sample in samples for entry in sample.get("skipped", ())]
        sample = samples[0] | ({"skipped": skipped} if skipped else {})
        if any("image" not in sample for sample in samples):
            sample.pop("image", None)
            return sample
        picture = combination([picture_of(sample) for sample in samples])
        instances = Instances(
            tuple(picture.image.shape[1:]), gt_boxes=picture.boxes, gt_classes=picture.classes
        )
        return sample | {"image": picture.image, "instances": instances}


def picture_of(sample: Sample) -> Picture:
    instances = sample["instances"]
    return Picture(sample["image"], instances.gt_boxes, instances.gt_classes)


def resize(picture: Picture, scale: float) -> Picture:
    """Resize a picture by a factor, to at least one pixel a side."""
    height, width = picture.image.shape[1:]
    size = [max(round(side * scale), 1) for side in (height, width)]
    transform = T.ResizeTransform(height, width, *size)
    # Copied, as Pillow's memory is read-only.
    image = transform.apply_image(picture.image.permute(1, 2, 0).numpy()).transpose(2, 0, 1).copy()
    boxes = picture.boxes.clone()
    boxes.scale(size[1] / width, size[0] / height)
    return Picture(torch.from_numpy(image), boxes, picture.classes)


def shift(boxes: Boxes, x: int, y: int) -> Boxes:
    return Boxes(boxes.tensor + boxes.tensor.new_tensor([x, y, x, y]))


def check_share(owner: str, name: str, value: float) -> None:
    """Raise a ConfigError if a value is not from 0 to 1."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{owner} has {name}={value}: accepted are numbers from 0 to 1")
