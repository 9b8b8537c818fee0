"""What detectors take in: images and ground truth, looked at before they reach a kernel."""

from collections.abc import Mapping, Sequence

import torch
from detectron2.structures import Instances
from torch import Tensor


def check_images(batched_inputs: Sequence[Mapping], channels: int) -> None:
    """Looks whether inputs are as Detectron2's data loaders and predictors make them.

    Raises:
        TypeError: they are no list of dicts, or an image is no tensor.
        ValueError: there is none, one has no image, or an image is not ``[channels, H, W]``.
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
        name = name_of(inputs)
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
    """Looks whether the ground truth of an image can be trained on.

    Raises:
        TypeError: its classes are no int64.
        ValueError: there is none, a class that the model does not know, or a box of NaN or
            infinity.
    """
    name, instances = name_of(inputs), instances_of(inputs)
    classes = instances.gt_classes
    # As indices, uint8 would be taken for a mask.
    if classes.dtype != torch.int64:
        raise TypeError(f"gt_classes of {name} must be torch.int64, got {classes.dtype}")
    if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
        raise ValueError(
            f"{name} has objects of classes {classes.unique().tolist()}, the model has "
            f"{num_classes}, counted from 0: set model.num_classes, in YAML "
            "MODEL.DETR.NUM_CLASSES, to the dataset's"
        )
    boxes = instances.gt_boxes.tensor
    finite = boxes.isfinite().all(1)
    if not finite.all():
        raise ValueError(
            f"{name} has boxes that are NaN or infinite, such as {boxes[~finite][0].tolist()}: "
            "correct them in the annotations, or the augmentation that makes them"
        )


def instances_of(inputs: Mapping) -> Instances:
    """The ground truth of an image.

    Raises:
        ValueError: there is none.
    """
    if "instances" not in inputs:
        raise ValueError(
            "in training every input needs `instances` with gt_boxes and gt_classes, and "
            f"{name_of(inputs)} has none: give them, or call model.eval() for inference"
        )
    return inputs["instances"]


def name_of(inputs: Mapping) -> str:
    """What to call an image in an error."""
    return inputs.get("file_name", "an image")


def describe(batched_inputs: object) -> str:
    kind = type(batched_inputs).__name__
    if not isinstance(batched_inputs, Sequence):
        return kind
    kinds = sorted({type(inputs).__name__ for inputs in batched_inputs})
    return f"{kind} of {', '.join(kinds)}"
