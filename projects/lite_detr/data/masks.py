"""Masks of objects, as COCO files give them: checked, and drawn for augmentations."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_masks

# The label of pixels without an object in :func:`draw_classes`.
NO_OBJECT = 255


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number that is not a bool."""
    # Comparing with the largest float also rejects NaN and integers too large for a float.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def usable_mask(segmentation: Any, size: tuple[int, int]) -> list | dict | None:
    """Return the part of a 'segmentation' that is a mask, as Detectron2 loads it, or None.

    Args:
        segmentation: polygons, of which those with three points or more are kept, or an object
            with ``counts`` and ``size``.
        size: height and width of the image.
    """
    if isinstance(segmentation, list):
        return [polygon for polygon in segmentation if _is_polygon(polygon)] or None
    if not isinstance(segmentation, dict) or segmentation.get("size") != list(size):
        return None
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        return {"size": list(size), "counts": counts} if _is_rle(counts, size) else None
    if not isinstance(counts, list) or any(type(n) is not int or n < 0 for n in counts):
        return None
    if sum(counts) != size[0] * size[1]:
        return None
    return coco_masks.frPyObjects({"size": list(size), "counts": counts}, *size)


def _is_polygon(value: Any) -> bool:
    if not isinstance(value, list) or len(value) < 6 or len(value) % 2:
        return False
    # A sum is NaN or infinite if one of its terms is; large datasets have millions of polygons.
    try:
        return set(map(type, value)) <= {int, float} and is_number(sum(value))
    except OverflowError:  # an integer that no float holds
        return False


def _is_rle(counts: str, size: tuple[int, int]) -> bool:
    """Return whether a compressed run-length code is one of a mask of that size.

    pycocotools, written in C, checks nothing: the code's numbers, of five bits a character, are
    added up here first. From the third on each is the difference to the last but one.
    """
    runs: list[int] = []
    position = 0
    while position < len(counts):
        number, shift, more = 0, 0, True
        while more:
            if position == len(counts) or shift > 60:
                return False
            bits = ord(counts[position]) - 48
            if not 0 <= bits < 64:
                return False
            number |= (bits & 31) << shift
            more = bool(bits & 32)
            position += 1
            shift += 5
            if not more and bits & 16:
                number -= 1 << shift
        run = number + (runs[-2] if len(runs) > 2 else 0)
        if run < 0:
            return False
        runs.append(run)
    return sum(runs) == size[0] * size[1]


def draw_classes(annotations: Sequence[dict], boxes: np.ndarray, size: tuple[int, int]):
    """Return the class of each pixel, ``[H, W]`` uint8, for augmentations that ask for it.

    An object without a usable mask fills its box. Later objects cover earlier ones.

    Args:
        annotations: of a record of Detectron2, with ``category_id`` and maybe ``segmentation``.
        boxes: theirs, ``[N, 4]``, corners in pixels.
        size: height and width of the image.
    """
    classes = np.full(size, NO_OBJECT, dtype=np.uint8)
    for annotation, box in zip(annotations, boxes):
        mask = usable_mask(annotation.get("segmentation"), size)
        if mask is None:
            x0, y0, x1, y1 = np.round(box).astype(int).clip(0)
            classes[y0:y1, x0:x1] = annotation["category_id"]
            continue
        codes = coco_masks.frPyObjects(mask, *size) if isinstance(mask, list) else mask
        code = coco_masks.merge(codes) if isinstance(codes, list) else codes
        classes[coco_masks.decode(code).astype(bool)] = annotation["category_id"]
    return classes
