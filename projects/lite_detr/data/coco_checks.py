"""Checks of a COCO-format dataset, made before training instead of failing in the middle of it."""

import json
import logging
import os
import reprlib
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import DatasetError
from .faults import Fault, Outcome, some

logger = logging.getLogger("lite_detr")

SECTIONS = ("images", "annotations", "categories")

# COCO rounds coordinates to two decimals, so its boxes pass the border by up to 0.01 pixel twice
# over (corner and size). That is not worth a warning; the loader clips such boxes all the same.
ROUNDING = 0.05


def no_annotations(json_file: str) -> str:
    """What to say of a training set without annotations."""
    return f"{json_file}: 'annotations' is empty; training needs at least one"


@dataclass(frozen=True)
class CocoSummary:
    """What a checked COCO file holds; both tuples are in the order of the category ids."""

    num_images: int
    num_annotations: int
    categories: tuple[str, ...]
    category_ids: tuple[int, ...]


def check_coco(json_file, image_root, for_evaluation=False) -> CocoSummary:
    """Checks a COCO-format annotation file and that the images it lists exist.

    Raises ``DatasetError`` for what would stop a run, and logs one warning for each kind of
    annotation that a run ignores or clips.

    Args:
        json_file: path of the annotation file.
        image_root: folder that the ``file_name`` of each image is relative to.
        for_evaluation: also demand ``area`` and ``iscrowd``, which pycocotools reads from each
            annotation when it evaluates, and which training does not need.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    content = load_coco(json_file)
    for fault in find_faults(json_file, image_root, content, for_evaluation):
        if fault.outcome is Outcome.REFUSED:
            raise DatasetError(fault.message)
        logger.warning("%s", fault.message)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    return CocoSummary(
        num_images=len(content["images"]),
        num_annotations=len(content["annotations"]),
        categories=tuple(category["name"] for category in categories),
        category_ids=tuple(category["id"] for category in categories),
    )


def load_coco(json_file: str) -> dict:
    """Reads a COCO file whose three lists hold objects with an id; raises ``DatasetError``."""
    content = load_json(json_file)
    for key in SECTIONS:
        for position, record in enumerate(get_section(json_file, content, key)):
            if not isinstance(record, dict) or type(record.get("id")) is not int:
                raise DatasetError(
                    f"{json_file}: entry {position} of '{key}' must be an object with an integer "
                    f"'id', but is {reprlib.repr(record)}"
                )
    for key in ("images", "categories"):
        if not content[key]:
            raise DatasetError(f"{json_file}: '{key}' is empty; list at least one entry")
    return content


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
        raise DatasetError(
            f"{json_file}: cannot be read ({error.strerror}); look at its permissions, and whether "
            "its disk is well"
        ) from None
    if not isinstance(content, dict):
        raise DatasetError(
            f"{json_file}: holds a JSON {type(content).__name__}, but a COCO file is an object "
            f"with the lists {some(SECTIONS)}"
        )
    return content


def get_section(json_file: str, content: dict, key: str) -> list:
    """Returns one of the top-level lists of a COCO file."""
    if not isinstance(content.get(key), list):
        found = f"is a {type(content[key]).__name__}" if key in content else "is missing"
        raise DatasetError(
            f"{json_file}: '{key}' {found}, but a COCO file holds the lists {some(SECTIONS)}"
        )
    return content[key]


def find_faults(
    json_file: str, image_root: str, content: dict, for_evaluation: bool
) -> Iterator[Fault]:
    """What of a file from :func:`load_coco` is refused, lost or changed, one fault for each kind.

    Arguments as those of :func:`check_coco`. What is refused in one way is not looked at in others,
    so that each fault is there for itself.
    """
    images, annotations, categories = (content[key] for key in SECTIONS)
    for key in SECTIONS:
        yield from _repeated_ids(json_file, key, content[key])
    yield from _unnamed_categories(json_file, categories)
    yield from _broken_images(json_file, images)
    yield from _missing_files(json_file, image_root, images)
    yield from _broken_annotations(json_file, annotations, images, categories)
    if for_evaluation:
        yield from _missing_evaluation_fields(json_file, annotations)
    yield from _lost_polygons(json_file, annotations)
    yield from _changed_boxes(json_file, annotations, images)


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


def has_file_name(image: dict) -> bool:
    """Whether an entry of 'images' names a file."""
    return isinstance(image.get("file_name"), str) and bool(image["file_name"])


def is_sound_box(value) -> bool:
    """Whether a 'bbox' is four finite numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _refused(json_file, kind, entry, bad, problem):
    more = f" (and {len(bad) - 1} more like it)" if len(bad) > 1 else ""
    message = f"{json_file}: {entry} {bad[0]['id']} {problem}{more}"
    return Fault(kind, Outcome.REFUSED, message, tuple(record["id"] for record in bad))


def _repeated_ids(json_file, key, records):
    counts = Counter(record["id"] for record in records)
    if repeated := [record_id for record_id, count in counts.items() if count > 1]:
        yield Fault(
            f"repeated ids in '{key}'",
            Outcome.REFUSED,
            f"{json_file}: each id in '{key}' must occur once, but these occur more often: "
            f"{some(repeated)}; give each entry an id of its own",
            tuple(repeated),
        )


def _unnamed_categories(json_file, categories):
    if bad := [c for c in categories if not isinstance(c.get("name"), str)]:
        problem = f"must have a 'name' that is a string, but it is {bad[0].get('name')!r}"
        yield _refused(json_file, "category without name", "category", bad, problem)


def _broken_images(json_file, images):
    if bad := [image for image in images if not has_file_name(image)]:
        name = bad[0].get("file_name")
        problem = f"must have a 'file_name' that is a string, but it is {name!r}"
        yield _refused(json_file, "image without file name", "image", bad, problem)
    if bad := [image for image in images if not _has_size(image)]:
        width, height = bad[0].get("width"), bad[0].get("height")
        problem = (
            "must have a positive 'width' and 'height' in pixels, but they are "
            f"{width!r} and {height!r}"
        )
        yield _refused(json_file, "image without size", "image", bad, problem)


def _missing_files(json_file, image_root, images):
    if not os.path.isdir(image_root):
        message = (
            f"{json_file}: image folder {image_root} not found; "
            "give the folder that holds the images of this file"
        )
        yield Fault("missing image folder", Outcome.REFUSED, message, (image_root,))
        return
    names = [image["file_name"] for image in images if has_file_name(image)]
    if missing := find_missing(image_root, names):
        message = (
            f"{json_file}: {len(missing)} of {len(images)} image files not found under "
            f"{image_root}: {some(missing, 3)}; give the folder that each 'file_name' is "
            "relative to, or remove these images from the file"
        )
        yield Fault("missing image file", Outcome.REFUSED, message, tuple(missing))


def find_missing(image_root: str, file_names: list[str]) -> list[str]:
    """The names without a file. Lists each folder once: asking for each file is slow on network
    disks."""
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


def _broken_annotations(json_file, annotations, images, categories):
    image_ids = {image["id"] for image in images}
    category_ids = {category["id"] for category in categories}
    listed = some(sorted(category_ids), 20)
    for kind, is_bad, problem in (
        (
            "unlisted image",
            lambda a: not _is_listed(a.get("image_id"), image_ids),
            lambda a: (
                f"has image_id {a.get('image_id')!r}, which is not the id of any of the "
                f"{len(images)} entries of 'images'; add that image or remove the annotation"
            ),
        ),
        (
            "unlisted category",
            lambda a: not _is_listed(a.get("category_id"), category_ids),
            lambda a: (
                f"has category_id {a.get('category_id')!r}, which 'categories' does not list "
                f"(listed: {listed}); add that category or remove the annotation"
            ),
        ),
        (
            "malformed box",
            lambda a: not is_sound_box(a.get("bbox")),
            lambda a: (
                "must have a 'bbox' of four finite numbers, [x, y, width, height], but it is "
                f"{reprlib.repr(a.get('bbox'))}; correct the box or remove the annotation"
            ),
        ),
        (
            "'ignore' flag",
            lambda a: a.get("ignore"),
            lambda a: (
                "has 'ignore' set, which Detectron2 does not support; "
                "use 'iscrowd' or remove the annotation"
            ),
        ),
        (
            "malformed crowd flag",
            lambda a: a.get("iscrowd", 0) not in (0, 1),
            lambda a: f"must have 0 or 1 as 'iscrowd', but it is {a['iscrowd']!r}",
        ),
        (
            "malformed mask",
            lambda a: a.get("segmentation") and not _is_mask(a["segmentation"]),
            lambda a: (
                "must have a 'segmentation' that is a list of polygons or an object with "
                f"'size' and 'counts', but it is {reprlib.repr(a['segmentation'])}; correct it, or "
                "remove it, since boxes need none"
            ),
        ),
    ):
        if bad := [annotation for annotation in annotations if is_bad(annotation)]:
            yield _refused(json_file, kind, "annotation", bad, problem(bad[0]))


def _missing_evaluation_fields(json_file, annotations):
    for key in ("area", "iscrowd"):
        if bad := [a for a in annotations if not _is_number(a.get(key))]:
            problem = (
                f"must have a number as '{key}', because COCO evaluation reads it, but it is "
                f"{bad[0].get(key)!r}; without masks, 'area' is the width times the height of the "
                "box, and 'iscrowd' is 0"
            )
            yield _refused(json_file, f"missing {key} in evaluation", "annotation", bad, problem)


def _lost_polygons(json_file, annotations):
    lost = tuple(
        a["id"] for a in annotations if a.get("segmentation") and _has_no_area(a["segmentation"])
    )
    if lost:
        message = (
            f"{json_file}: {len(lost)} annotation(s) whose polygons all have fewer than three "
            f"points, ignored in training: annotation ids {some(lost, 5)}; correct the "
            "polygons, or remove 'segmentation' to keep the box"
        )
        yield Fault("mask without area", Outcome.LOST, message, lost)


def _changed_boxes(json_file, annotations, images):
    size_of = {
        image["id"]: (image["width"], image["height"]) for image in images if _has_size(image)
    }
    sound = [
        a
        for a in annotations
        if is_sound_box(a.get("bbox")) and _is_listed(a.get("image_id"), size_of)
    ]
    boxes = np.array([a["bbox"] for a in sound], dtype=np.float64).reshape(-1, 4)
    sizes = np.array([size_of[a["image_id"]] for a in sound], dtype=np.float64).reshape(-1, 2)

    degenerate = (boxes[:, 2:] <= 0).any(axis=1)
    outside = ~clip_boxes(boxes, sizes)[1] & ~degenerate
    beyond = (boxes[:, :2] < -ROUNDING) | (boxes[:, :2] + boxes[:, 2:] > sizes + ROUNDING)
    reaching_out = beyond.any(axis=1) & ~degenerate & ~outside

    for kind, outcome, mask, problem in (
        (
            "degenerate box",
            Outcome.LOST,
            degenerate,
            "of zero or negative width or height, ignored in training",
        ),
        (
            "box outside the image",
            Outcome.LOST,
            outside,
            "wholly outside the image, ignored in training",
        ),
        (
            "box reaching outside the image",
            Outcome.CHANGED,
            reaching_out,
            "reaching outside the image, clipped to it in training",
        ),
    ):
        if found := tuple(sound[i]["id"] for i in np.flatnonzero(mask)):
            message = (
                f"{json_file}: {len(found)} box(es) {problem}: annotation ids {some(found, 5)}"
            )
            yield Fault(kind, outcome, message, found)


def _has_size(image):
    return all(_is_number(side) and side > 0 for side in (image.get("width"), image.get("height")))


def _is_number(value):
    # Comparing with the largest float also turns away NaN and integers too large for a float.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_mask(value):
    if isinstance(value, dict):
        return "counts" in value and "size" in value
    return isinstance(value, list) and all(isinstance(polygon, list) for polygon in value)


def _has_no_area(mask):
    # What Detectron2 takes for no polygon, and whose annotation it drops.
    return _is_mask(mask) and isinstance(mask, list) and all(len(p) < 6 or len(p) % 2 for p in mask)


def _is_listed(value, ids):
    # The type comes first because a list or an object cannot be looked up in a set.
    return type(value) is int and value in ids
