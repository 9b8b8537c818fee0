"""Checks of a COCO-format dataset, made before training instead of failing in the middle of it."""

import json
import logging
import os
import reprlib
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

logger = logging.getLogger("lite_detr")

SECTIONS = ("images", "annotations", "categories")

# COCO rounds coordinates to two decimals, so its boxes pass the border by up to 0.01 pixel twice
# over (corner and size). That is not worth a warning; the loader clips such boxes all the same.
ROUNDING = 0.05


class DatasetError(ValueError):
    """A dataset that cannot be used; the message names the file and what to change in it."""


@dataclass(frozen=True)
class CocoSummary:
    """What a checked COCO file holds; both tuples are in the order of the category ids."""

    num_images: int
    num_annotations: int
    categories: tuple[str, ...]
    category_ids: tuple[int, ...]


def check_coco(json_file, image_root, for_evaluation=False) -> CocoSummary:
    """Checks a COCO-format annotation file and that the images it lists exist.

    Raises ``DatasetError`` for what would stop a run, and logs one warning for each kind of box
    that a run ignores or clips.

    Args:
        json_file: path of the annotation file.
        image_root: folder that the ``file_name`` of each image is relative to.
        for_evaluation: also demand ``area`` and ``iscrowd``, which pycocotools reads from each
            annotation when it evaluates, and which training does not need.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    content = load_json(json_file)
    images, annotations, categories = (get_section(json_file, content, key) for key in SECTIONS)
    for key, records in (("images", images), ("categories", categories)):
        if not records:
            raise DatasetError(f"{json_file}: '{key}' is empty; list at least one entry")
    for key, records in zip(SECTIONS, (images, annotations, categories)):
        _check_ids(json_file, key, records)

    _check_categories(json_file, categories)
    _check_images(json_file, image_root, images)
    _check_annotations(json_file, annotations, images, categories)
    if for_evaluation:
        _check_evaluation_fields(json_file, annotations)
    _warn_about_boxes(json_file, annotations, images)

    categories = sorted(categories, key=lambda category: category["id"])
    return CocoSummary(
        num_images=len(images),
        num_annotations=len(annotations),
        categories=tuple(category["name"] for category in categories),
        category_ids=tuple(category["id"] for category in categories),
    )


def load_json(json_file: str) -> dict:
    """Reads the JSON object that a COCO file consists of."""
    if not os.path.isfile(json_file):
        raise DatasetError(
            f"{json_file}: annotation file not found; give the path of a COCO-format json file"
        )
    try:
        with open(json_file, encoding="utf-8") as file:
            content = json.load(file)
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{json_file}: not valid JSON at line {error.lineno}, column {error.colno} "
            f"({error.msg}); give a COCO-format json file"
        ) from None
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{json_file}: not UTF-8 text ({error.reason} at byte {error.start}); "
            "give a COCO-format json file"
        ) from None
    except OSError as error:
        raise DatasetError(f"{json_file}: cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise DatasetError(
            f"{json_file}: holds a JSON {type(content).__name__}, but a COCO file is an object "
            f"with the lists {_some(SECTIONS)}"
        )
    return content


def get_section(json_file: str, content: dict, key: str) -> list:
    """Returns one of the top-level lists of a COCO file."""
    if not isinstance(content.get(key), list):
        found = f"is a {type(content[key]).__name__}" if key in content else "is missing"
        raise DatasetError(
            f"{json_file}: '{key}' {found}, but a COCO file holds the lists {_some(SECTIONS)}"
        )
    return content[key]


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clips (N, 4) XYWH boxes to their images' (N, 2) sizes, width first.

    Returns the clipped boxes and a mask of the usable ones, which have an area inside the image.
    Boxes that do not reach outside come back bit by bit as they were given.
    """
    start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    inside = ((start >= 0) & (end <= sizes)).all(axis=1, keepdims=True)
    clipped_start = np.clip(start, 0, sizes)
    clipped_size = np.clip(end, 0, sizes) - clipped_start
    clipped = np.where(inside, boxes, np.concatenate([clipped_start, clipped_size], axis=1))
    return clipped, (clipped[:, 2:] > 0).all(axis=1)


def _check_ids(json_file, key, records):
    for position, record in enumerate(records):
        if not isinstance(record, dict) or type(record.get("id")) is not int:
            raise DatasetError(
                f"{json_file}: entry {position} of '{key}' must be an object with an integer "
                f"'id', but is {reprlib.repr(record)}"
            )
    counts = Counter(record["id"] for record in records)
    if len(counts) < len(records):
        repeated = [record_id for record_id, count in counts.items() if count > 1]
        raise DatasetError(
            f"{json_file}: each id in '{key}' must occur once, but these occur more often: "
            f"{_some(repeated)}; give each entry an id of its own"
        )


def _check_categories(json_file, categories):
    for category in categories:
        if not isinstance(category.get("name"), str):
            raise DatasetError(
                f"{json_file}: category {category['id']} must have a 'name' that is a string, "
                f"but it is {category.get('name')!r}"
            )


def _check_images(json_file, image_root, images):
    for image in images:
        name, size = image.get("file_name"), (image.get("width"), image.get("height"))
        if not isinstance(name, str) or not name:
            raise DatasetError(
                f"{json_file}: image {image['id']} must have a 'file_name' that is a string, "
                f"but it is {name!r}"
            )
        if not all(_is_number(side) and side > 0 for side in size):
            raise DatasetError(
                f"{json_file}: image {image['id']} must have a positive 'width' and 'height' in "
                f"pixels, but they are {size[0]!r} and {size[1]!r}"
            )
    if not os.path.isdir(image_root):
        raise DatasetError(
            f"{json_file}: image folder {image_root} not found; "
            "give the folder that holds the images of this file"
        )
    missing = _find_missing(image_root, [image["file_name"] for image in images])
    if missing:
        raise DatasetError(
            f"{json_file}: {len(missing)} of {len(images)} image files not found under "
            f"{image_root}: {_some(missing, 3)}; give the folder that each 'file_name' is "
            "relative to, or remove these images from the file"
        )


def _find_missing(image_root, file_names):
    """Lists each folder once: asking for each file is slow on network disks."""
    names_by_folder = defaultdict(list)
    for name in file_names:
        names_by_folder[os.path.dirname(name)].append(name)
    missing = []
    for folder, names in names_by_folder.items():
        try:
            with os.scandir(os.path.join(image_root, folder)) as entries:
                present = {entry.name for entry in entries if entry.is_file()}
        except OSError:
            present = set()
        missing += [name for name in names if os.path.basename(name) not in present]
    return missing


def _check_annotations(json_file, annotations, images, categories):
    image_ids = {image["id"] for image in images}
    category_ids = {category["id"] for category in categories}
    listed = _some(sorted(category_ids), 20)
    if bad := [a for a in annotations if not _is_listed(a.get("image_id"), image_ids)]:
        raise _annotation_error(
            json_file,
            bad,
            f"has image_id {bad[0].get('image_id')!r}, which is not the id of any of the "
            f"{len(images)} entries of 'images'; add that image or remove the annotation",
        )
    if bad := [a for a in annotations if not _is_listed(a.get("category_id"), category_ids)]:
        raise _annotation_error(
            json_file,
            bad,
            f"has category_id {bad[0].get('category_id')!r}, which 'categories' does not list "
            f"(listed: {listed}); add that category or remove the annotation",
        )
    if bad := [a for a in annotations if not _is_box(a.get("bbox"))]:
        raise _annotation_error(
            json_file,
            bad,
            "must have a 'bbox' of four finite numbers, [x, y, width, height], but it is "
            f"{reprlib.repr(bad[0].get('bbox'))}; correct the box or remove the annotation",
        )
    if bad := [a for a in annotations if a.get("ignore")]:
        raise _annotation_error(
            json_file,
            bad,
            "has 'ignore' set, which Detectron2 does not support; "
            "use 'iscrowd' or remove the annotation",
        )


def _annotation_error(json_file, bad, problem):
    more = f" (and {len(bad) - 1} more like it)" if len(bad) > 1 else ""
    return DatasetError(f"{json_file}: annotation {bad[0]['id']} {problem}{more}")


def _check_evaluation_fields(json_file, annotations):
    for annotation in annotations:
        for key in ("area", "iscrowd"):
            if not isinstance(annotation.get(key), (int, float)):
                raise DatasetError(
                    f"{json_file}: annotation {annotation['id']} must have a number as '{key}', "
                    f"because COCO evaluation reads it, but it is {annotation.get(key)!r}; without "
                    "masks, 'area' is the width times the height of the box, and 'iscrowd' is 0"
                )


def _warn_about_boxes(json_file, annotations, images):
    size_of = {image["id"]: (image["width"], image["height"]) for image in images}
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    sizes = np.array([size_of[a["image_id"]] for a in annotations], dtype=np.float64).reshape(-1, 2)

    degenerate = (boxes[:, 2:] <= 0).any(axis=1)
    outside = ~clip_boxes(boxes, sizes)[1] & ~degenerate
    beyond = (boxes[:, :2] < -ROUNDING) | (boxes[:, :2] + boxes[:, 2:] > sizes + ROUNDING)
    reaching_out = beyond.any(axis=1) & ~degenerate & ~outside

    for mask, problem in (
        (degenerate, "of zero or negative width or height, ignored in training"),
        (outside, "wholly outside the image, ignored in training"),
        (reaching_out, "reaching outside the image, clipped to it in training"),
    ):
        found = np.flatnonzero(mask)
        if len(found):
            ids = _some([annotations[i]["id"] for i in found[:6]], 5)
            logger.warning(
                "%s: %d box(es) %s: annotation ids %s", json_file, len(found), problem, ids
            )


def _is_number(value):
    # Comparing with the largest float also turns away NaN and integers too large for a float.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_box(value):
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_listed(value, ids):
    # The type comes first because a list or an object cannot be looked up in a set.
    return type(value) is int and value in ids


def _some(items, limit=10):
    """Joins the first items for a message."""
    text = ", ".join(str(item) for item in items[:limit])
    return text + ", ..." if len(items) > limit else text
