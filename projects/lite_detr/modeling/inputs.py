"""Validate what a detector is given, and pad the images of a batch to one size."""

from collections.abc import Mapping, Sequence

import torch
from detectron2.modeling import Backbone
from detectron2.structures import ImageList, Instances, RotatedBoxes
from torch import Tensor

from ..errors import ConfigError, DatasetError


def check_images(batched_inputs: Sequence[Mapping], channels: int) -> None:
    """Validate images, which should be as Detectron2's data loaders and predictors make them.

    Raises:
        TypeError: the inputs are not a list of dicts, or an image is not a tensor.
        ValueError: the list is empty, a dict has no image, or an image is not ``[channels, H, W]``.
    """
    if not isinstance(batched_inputs, Sequence) or not all(
        isinstance(inputs, Mapping) for inputs in batched_inputs
    ):
        raise TypeError(
            'a detector takes a list with a dict for each image, such as [{"image": image}], got '
            f"{describe(batched_inputs)}"
        )
    if not batched_inputs:
        raise ValueError("a detector takes at least one image, got an empty list")
    for inputs in batched_inputs:
        name = get_name(inputs)
        if "image" not in inputs:
            raise ValueError(
                f"{name} has no `image`, only {', '.join(map(str, inputs)) or 'an empty dict'}: "
                f"give its pixels as a tensor [{channels}, H, W]"
            )
        image = inputs["image"]
        if not isinstance(image, Tensor):
            raise TypeError(
                f"`image` of {name} must be a tensor [{channels}, H, W], got "
                f"{type(image).__name__}: torch.as_tensor makes one of an array"
            )
        if image.dim() != 3 or image.shape[0] != channels or 0 in image.shape:
            raise ValueError(
                f"`image` of {name} must be [{channels}, H, W], one image with its channels first "
                f"and at least one pixel, got {tuple(image.shape)}"
            )


def check_objects(inputs: Mapping, num_classes: int) -> None:
    """Validate the ground truth of an image.

    Raises:
        TypeError: the classes are not int64.
        ValueError: there is no ground truth.
        DatasetError: boxes or classes are missing, the boxes are rotated, a class is outside the
            model's range, or a box is NaN or infinite.
    """
    name, instances = get_name(inputs), get_instances(inputs)
    for field in ("gt_boxes", "gt_classes"):
        if not instances.has(field):
            raise DatasetError(
                f"the `instances` of {name} have no {field}, only "
                f"{', '.join(instances.get_fields()) or 'nothing'}: the mapper must give each "
                "object a box and a class"
            )
    if isinstance(instances.gt_boxes, RotatedBoxes):
        raise DatasetError(
            f"{name} has rotated boxes, and the detectors find upright ones: give gt_boxes as "
            "Boxes, such as those around the rotated ones"
        )
    classes = instances.gt_classes
    # uint8 indices would be taken for a mask.
    if classes.dtype != torch.int64:
        raise TypeError(f"gt_classes of {name} must be torch.int64, got {classes.dtype}")
    if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
        raise DatasetError(
            f"{name} has objects of classes {classes.unique().tolist()}, the model has "
            f"{num_classes}, counted from 0: set model.num_classes, in YAML "
            "MODEL.DETR.NUM_CLASSES, to the dataset's"
        )
    boxes = instances.gt_boxes.tensor
    finite = boxes.isfinite().all(1)
    if not finite.all():
        raise DatasetError(
            f"{name} has boxes that are NaN or infinite, such as {boxes[~finite][0].tolist()}: "
            "correct them in the annotations, or the augmentation that makes them"
        )


def get_instances(inputs: Mapping) -> Instances:
    """Return the ground truth of an image.

    Raises:
        ValueError: there is none.
    """
    if "instances" not in inputs:
        raise ValueError(
            "in training every input needs `instances` with gt_boxes and gt_classes, and "
            f"{get_name(inputs)} has none: give them, or call model.eval() for inference"
        )
    return inputs["instances"]


def get_name(inputs: Mapping) -> str:
    """Return what to call an image in an error."""
    return inputs.get("file_name", "an image")


def describe(batched_inputs: object) -> str:
    kind = type(batched_inputs).__name__
    if not isinstance(batched_inputs, Sequence):
        return kind
    kinds = sorted({type(inputs).__name__ for inputs in batched_inputs})
    return f"{kind} of {', '.join(kinds)}"


def batch_images(images: Sequence[Tensor], backbone: Backbone) -> ImageList:
    """Pad images ``[3, H, W]`` at the bottom and right to one size that the backbone accepts.

    The list remembers the size of each image; padding masks are made from these.

    Raises:
        ConfigError: an image is larger than the square that the backbone pads to.
    """
    constraints = backbone.padding_constraints
    square = constraints.get("square_size", 0)
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    if square and max(height, width) > square:
        # Detectron2 would crop the image and keep its boxes.
        raise ConfigError(
            f"images of up to {height}x{width} pixels do not fit the square of {square} that the "
            f"backbone pads to: make them smaller in the augmentations (max_size={square}), or set "
            "the backbone's square_pad to their size, or to 0 to pad only as much as needed"
        )
    return ImageList.from_tensors(
        list(images),
        padding_constraints={"square_size": square, "size_divisibility": divisibility(backbone)},
    )


def divisibility(backbone: Backbone) -> int:
    """Return the number that heights and widths must be multiples of; 0 if any size will do."""
    constraints = backbone.padding_constraints
    # The second is how SimpleFeaturePyramid spells it.
    for name in ("size_divisibility", "size_divisiblity"):
        if name in constraints:
            return constraints[name]
    # SwinTransformer's property fails on a misspelt attribute. That model pads by itself.
    return getattr(backbone, "size_divisibility", 0)
