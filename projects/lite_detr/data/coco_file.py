"""Reading COCO-format datasets, and their way to and from Detectron2's records."""

import json
import os
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from ..errors import DatasetError
from ..labels import printable
from .masks import is_number, usable_mask

SECTIONS = ("images", "annotations", "categories")
# Of ids, which NumPy holds when COCO's evaluation sorts them.
MAX_ID = 2**63 - 1
# In square pixels. COCO's evaluation ignores objects of other areas: it costs nothing to miss them.
MAX_AREA = 1e10


@dataclass(frozen=True)
class CocoSummary:
    """The contents of a checked COCO file; both tuples are in the order of the category ids.

    Attributes:
        num_objects: annotations that training uses: no crowd regions, no boxes without area.
    """

    num_images: int
    num_annotations: int
    categories: tuple[str, ...]
    category_ids: tuple[int, ...]
    num_objects: int = 0


def load_coco(json_file: str) -> dict:
    """Read a COCO file whose three lists hold objects with an id.

    Raises:
        DatasetError: it is not such a file.
    """
    content = load_json(json_file)
    for key in SECTIONS:
        for position, record in enumerate(get_section(json_file, content, key)):
            if not isinstance(record, dict) or type(record.get("id")) is not int:
                raise DatasetError(
                    f"{json_file}: entry {position} of '{key}' must be an object with an integer "
                    f"'id', but is {shown(record)}"
                )
            if abs(record["id"]) > MAX_ID:
                raise DatasetError(
                    f"{json_file}: entry {position} of '{key}' has an 'id' of more than 64 bits; "
                    "number the entries from 1 on"
                )
    for key in ("images", "categories"):
        if not content[key]:
            raise DatasetError(f"{json_file}: '{key}' is empty; list at least one entry")
    return content


def load_json(json_file: str) -> dict:
    """Read the JSON object of a COCO file.

    Raises:
        DatasetError: it cannot be read, or is not a JSON object.
    """
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
    except RecursionError:
        raise DatasetError(
            f"{json_file}: its lists and objects are nested too deeply; give a COCO-format json "
            "file"
        ) from None
    # Python refuses to read integers of more than some thousand digits.
    except ValueError as error:
        reason = str(error).partition(";")[0]
        raise DatasetError(
            f"{json_file}: holds a number that cannot be read ({reason}); correct it"
        ) from None
    except OSError as error:
        raise DatasetError(
            f"{json_file}: cannot be read ({error.strerror}); check its permissions and its disk"
        ) from None
    if not isinstance(content, dict):
        raise DatasetError(
            f"{json_file}: holds a JSON {type(content).__name__}, but a COCO file is an object "
            f"with the lists {', '.join(SECTIONS)}"
        )
    return content


def get_section(json_file: str, content: dict, key: str) -> list:
    """Return one of the top-level lists of a COCO file."""
    if not isinstance(content.get(key), list):
        found = f"is a {type(content[key]).__name__}" if key in content else "is missing"
        raise DatasetError(
            f"{json_file}: '{key}' {found}, but a COCO file holds the lists {', '.join(SECTIONS)}"
        )
    return content[key]


def shown(value: Any) -> str:
    """Return a value for a message, shortened, on one line."""
    try:
        return printable(reprlib.repr(value))
    # Python refuses to write integers of more than some thousand digits.
    except ValueError:
        return f"a {type(value).__name__} of too many digits"


def is_sound_box(value: Any) -> bool:
    """Return whether a 'bbox' is four finite numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def box_area(box: Sequence[float]) -> float:
    """Return the area of an XYWH box in square pixels, at most the largest that COCO counts."""
    width, height = (max(side, 0.0) for side in box[2:])
    return min(width * height, MAX_AREA)


def has_usable_area(annotation: dict) -> bool:
    """Return whether COCO's evaluation counts an annotation by its 'area'.

    An area of zero is a placeholder, unless the box has none either.
    """
    area, box = annotation.get("area"), annotation["bbox"]
    if not is_number(area) or not 0 <= area <= MAX_AREA:
        return False
    return area > 0 or min(box[2:]) <= 0


def contiguous_ids(category_ids: Sequence[int]) -> dict[int, int]:
    """Return the class number of each category id, from 0 in the order of the ids."""
    return {category_id: i for i, category_id in enumerate(sorted(category_ids))}


def coco_to_records(content: dict, image_root: str) -> list[dict]:
    """Return Detectron2's records of a COCO file that has been checked.

    As Detectron2's ``load_coco_json``, with two differences: an annotation whose mask is broken
    keeps its box, and keypoints are not read. Boxes are clipped to the image, and annotations
    whose box has no area inside the image are dropped.

    Args:
        content: see :func:`load_coco`.
        image_root: the folder that each ``file_name`` is relative to.
    """
    class_of = contiguous_ids([category["id"] for category in content["categories"]])
    annotations_of = defaultdict(list)
    for annotation in content["annotations"]:
        annotations_of[annotation["image_id"]].append(annotation)
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": _record_annotations(annotations_of[image["id"]], image, class_of),
        }
        for image in sorted(content["images"], key=lambda image: image["id"])
    ]


def _record_annotations(annotations: list[dict], image: dict, class_of: dict) -> list[dict]:
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    sizes = np.array([[image["width"], image["height"]]], dtype=np.float64)
    boxes, usable = clip_boxes(boxes, sizes)
    kept = []
    for annotation, box, keep in zip(annotations, boxes.tolist(), usable):
        if not keep:
            continue
        kept.append(
            {
                "iscrowd": int(annotation.get("iscrowd", 0)),
                "bbox": box,
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": class_of[annotation["category_id"]],
            }
        )
        mask = usable_mask(annotation.get("segmentation"), (image["height"], image["width"]))
        if mask is not None:
            kept[-1]["segmentation"] = mask
    return kept


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clip (N, 4) XYWH boxes to their images' (N, 2) sizes, width first.

    Returns:
        The clipped boxes, and a mask of the usable ones, which have an area inside the image.
        Boxes that do not reach outside come back bit by bit as they were given.
    """
    start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    inside = ((start >= 0) & (end <= sizes)).all(axis=1, keepdims=True)
    clipped_start = np.clip(start, 0, sizes)
    clipped_size = np.clip(end, 0, sizes) - clipped_start
    clipped = np.where(inside, boxes, np.concatenate([clipped_start, clipped_size], axis=1))
    return clipped, (clipped[:, 2:] > 0).all(axis=1)


def records_to_coco(
    name: str, records: Iterable[dict], classes: Sequence[str] | None, split: str
) -> dict:
    """Return the COCO content of Detectron2's records, with their images' ids.

    Class numbers become category ids, from 0 on. Masks are left out.

    Args:
        name: of the dataset, for messages.
        records: as a function of Detectron2's ``DatasetCatalog`` returns them.
        classes: the names of the classes; None lists the numbers that occur.
        split: "train", or "test" for evaluation, which needs an ``image_id`` in each record.

    Raises:
        DatasetError: records are not of Detectron2's format.
    """
    images, annotations, numbers = [], [], set()
    for position, record in enumerate(records):
        where = f"dataset {name!r}: record {position}"
        if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
            raise DatasetError(f"{where} must be a dict with a 'file_name', but is {shown(record)}")
        image_id = record.get("image_id") if split == "test" else position
        # NumPy's numbers and strings become Python's.
        image_id = image_id.item() if isinstance(image_id, np.generic) else image_id
        if type(image_id) not in (int, str):
            raise DatasetError(
                f"{where} must have a number or a string as 'image_id', by which evaluation "
                f"assigns detections to images, but it is {shown(image_id)}"
            )
        size = {key: record[key] for key in ("width", "height") if key in record}
        images.append({"id": image_id, "file_name": record["file_name"], **size})
        for annotation in record.get("annotations", ()):
            number = annotation.get("category_id")
            number = number.item() if isinstance(number, np.generic) else number
            if type(number) is not int or number < 0:
                raise DatasetError(
                    f"{where} has an object with {shown(number)} as 'category_id'; accepted are "
                    "class numbers from 0 on"
                )
            numbers.add(number)
            box = _xywh_box(where, annotation)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": number,
                    "bbox": box,
                    "area": box_area(box),
                    "iscrowd": annotation.get("iscrowd", 0),
                }
            )
    if not images:
        raise DatasetError(f"dataset {name!r} has no images: its function returned an empty list")
    listed = enumerate(classes) if classes is not None else ((n, str(n)) for n in sorted(numbers))
    categories = [{"id": number, "name": class_name} for number, class_name in listed]
    return {"images": images, "annotations": annotations, "categories": categories}


def _xywh_box(where: str, annotation: dict) -> list[float]:
    try:
        box = np.asarray(annotation["bbox"], dtype=np.float64).tolist()
        mode = BoxMode(annotation["bbox_mode"])
        if mode not in (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) or not is_sound_box(box):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        is_rotated = annotation.get("bbox_mode") == BoxMode.XYWHA_ABS
        hint = "; the detectors find upright boxes, not rotated ones" if is_rotated else ""
        raise DatasetError(
            f"{where} has an object without a box of four finite numbers in BoxMode.XYWH_ABS or "
            f"XYXY_ABS: 'bbox' is {shown(annotation.get('bbox'))}, 'bbox_mode' is "
            f"{shown(annotation.get('bbox_mode'))}{hint}"
        ) from None
    return BoxMode.convert(box, mode, BoxMode.XYWH_ABS)
