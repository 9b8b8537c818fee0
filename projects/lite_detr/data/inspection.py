"""Inspection of a dataset before a run: reads every file, finds all faults, and summarises."""

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ..errors import DatasetError, ImageError
from .coco_checks import count_objects, find_faults, has_file_name, no_objects_reason
from .coco_file import is_sound_box, load_coco
from .faults import Fault, Outcome, join_first
from .image_files import (
    IMAGE_FORMATS,
    OTHER_SIZE,
    TOO_LARGE,
    TOO_THIN,
    UNREADABLE,
    WIDE_PIXELS,
    is_grey_16_bits,
    read_record,
)
from .train_loader import MAX_UNUSABLE

# A side, and a ratio of the sides, from which on an image is reported.
LARGE_SIDE = 12_000
PANORAMA = 20

UNUSABLE_KINDS = (UNREADABLE, TOO_LARGE, WIDE_PIXELS, OTHER_SIZE, TOO_THIN)
_EXIF_ORIENTATION = 274

# Other kinds of images, and what becomes of them.
FILE_KINDS = {
    "grey image of 16 bits": (Outcome.CHANGED, "used with the upper eight bits"),
    "image with transparency": (Outcome.CHANGED, "used as if all of it were opaque"),
    "image of several frames": (Outcome.CHANGED, "used with the first frame"),
    "CMYK image": (Outcome.CHANGED, "converted to RGB without a colour profile"),
    "greyscale image": (Outcome.USED, "used with three equal channels"),
    "palette image": (Outcome.USED, "used with the palette's colours"),
    "image turned by EXIF": (Outcome.USED, "turned upright, as its boxes are taken to be"),
    "image of one pixel's width": (Outcome.USED, "used"),
    "panorama": (Outcome.USED, f"used; its sides are at least {PANORAMA} : 1"),
    "large image": (
        Outcome.USED,
        f"used; a side of at least {LARGE_SIDE} pixels, which takes memory in each worker",
    ),
}


@dataclass(frozen=True)
class Inspection:
    """The result for one dataset.

    Attributes:
        faults: sorted by outcome, the worst first.
        summary: numbers that describe the dataset; empty if its file cannot be read.
        categories, category_ids: in the order of the ids; likewise.
    """

    faults: tuple[Fault, ...]
    summary: dict = field(default_factory=dict)
    categories: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()

    @property
    def loses_data(self) -> bool:
        """True if a run would be refused, stop, or skip a part of the data."""
        return any(fault.outcome in (Outcome.REFUSED, Outcome.LOST) for fault in self.faults)


def inspect_dataset(
    json_file: str,
    image_root: str,
    for_evaluation: bool,
    num_queries: int | None = None,
    map_files: Callable[[Callable, list], Iterable] = map,
) -> Inspection:
    """Read an annotation file and all its images.

    Args:
        json_file, image_root, for_evaluation: see :func:`check_coco`.
        num_queries, map_files: see :func:`inspect_content`.
    """
    try:
        content = load_coco(json_file)
    except DatasetError as error:
        fault = Fault("annotation file", Outcome.REFUSED, str(error), (json_file,))
        return Inspection((fault,))
    return inspect_content(json_file, image_root, content, for_evaluation, num_queries, map_files)


def inspect_content(
    source: str,
    image_root: str,
    content: dict,
    for_evaluation: bool,
    num_queries: int | None = None,
    map_files: Callable[[Callable, list], Iterable] = map,
    in_catalog: bool = False,
) -> Inspection:
    """Inspect a dataset that has been loaded, and read all its images.

    Args:
        source, image_root, content, for_evaluation, in_catalog: see :func:`find_faults`.
        num_queries: the number of objects of an image that the model can match.
        map_files: applies a function to a list of picklable arguments, in order; for a pool of
            processes.
    """
    faults = list(find_faults(source, image_root, content, for_evaluation, in_catalog))
    missing = {name for f in faults if f.kind == "missing image file" for name in f.where}
    if not image_root or os.path.isdir(image_root):
        images = [
            i for i in content["images"] if has_file_name(i) and i["file_name"] not in missing
        ]
        faults += _file_faults(image_root, images, for_evaluation, map_files)
    if not for_evaluation and all(fault.outcome is not Outcome.REFUSED for fault in faults):
        message = no_objects_reason(source, len(content["annotations"]), count_objects(content))
        if message:
            faults.append(Fault("no objects", Outcome.REFUSED, message, (source,)))
    faults += _notes(content, num_queries)
    order = list(Outcome)
    faults.sort(key=lambda fault: order.index(fault.outcome))
    categories = sorted(content["categories"], key=lambda category: category["id"])
    return Inspection(
        tuple(faults),
        summarise(content),
        tuple(str(category.get("name")) for category in categories),
        tuple(category["id"] for category in categories),
    )


def inspect_file(record: dict) -> list[tuple[str, str]]:
    """Return the kinds and reasons of one image file; none for an ordinary photograph.

    Args:
        record: ``file_name``, a path, and ``width`` and ``height`` as the annotation file has them.
    """
    with warnings.catch_warnings():
        # Pillow's, about large files and odd metadata: those that matter are reported here.
        warnings.simplefilter("ignore")
        try:
            read_record(record, "RGB")
        except ImageError as error:
            return [(error.kind, error.reason)]
        with Image.open(record["file_name"], formats=IMAGE_FORMATS) as image:
            return [(kind, FILE_KINDS[kind][1]) for kind in _describe(image)]


def summarise(content: dict) -> dict:
    """Summarise a file from :func:`load_coco`; crowd regions and malformed boxes do not count."""
    names = {category["id"]: str(category.get("name")) for category in content["categories"]}
    objects = [a for a in content["annotations"] if _is_object(a) and a["category_id"] in names]
    per_class = Counter(names[a["category_id"]] for a in objects)
    per_image = Counter(a["image_id"] for a in objects)
    counts = [per_image[image["id"]] for image in content["images"]]
    sides = {
        side: [image[side] for image in content["images"] if type(image.get(side)) in (int, float)]
        for side in ("width", "height")
    }
    return {
        "images": len(content["images"]),
        "annotations": len(content["annotations"]),
        "objects": len(objects),
        "objects_by_class": {name: per_class[name] for name in names.values()},
        "objects_by_size": count_by_size(a["bbox"][2] * a["bbox"][3] for a in objects),
        "objects_per_image": _range(counts),
    } | {side: _range(values or [0]) for side, values in sides.items()}


def count_by_size(areas: Iterable[float]) -> dict[str, int]:
    """Return the number of areas, in square pixels, in each of COCO's three ranges."""
    counts = {"small": 0, "medium": 0, "large": 0}
    for area in areas:
        counts["small" if area < 32**2 else "medium" if area < 96**2 else "large"] += 1
    return counts


def _range(values):
    return {
        "smallest": min(values),
        "median": float(np.median(values)),
        "largest": max(values),
    }


def _file_faults(image_root, images, for_evaluation, map_files):
    records = [
        {key: image[key] for key in ("width", "height") if key in image}
        | {"file_name": os.path.join(image_root, image["file_name"])}
        for image in images
    ]
    names, reasons = defaultdict(list), defaultdict(list)
    for image, found in zip(images, map_files(inspect_file, records)):
        for kind, reason in found:
            names[kind].append(image["file_name"])
            reasons[kind].append(reason)
    for kind in (*UNUSABLE_KINDS, *FILE_KINDS):
        if kind in names:
            is_unusable = kind in UNUSABLE_KINDS
            outcome = Outcome.LOST if is_unusable else FILE_KINDS[kind][0]
            message = f"{len(names[kind])} x {kind}: {reasons[kind][0]}"
            listed = tuple(reasons[kind]) if is_unusable else ()
            yield Fault(kind, outcome, message, tuple(names[kind]), listed)
    unusable = [name for kind in UNUSABLE_KINDS for name in names.get(kind, ())]
    if not for_evaluation and len(unusable) > MAX_UNUSABLE * len(images):
        message = (
            f"{len(unusable)} of {len(images)} images are unusable: training stops once it has "
            f"met more than {MAX_UNUSABLE:.0%} (dataloader.train.max_unusable)"
        )
        yield Fault("too many unusable images", Outcome.REFUSED, message, tuple(unusable))


def _describe(image: Image.Image) -> Iterator[str]:
    """Yield the keys of FILE_KINDS that fit an opened image."""
    if is_grey_16_bits(image):
        yield "grey image of 16 bits"
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        yield "image with transparency"
    if _or_one(lambda: image.n_frames) > 1:
        yield "image of several frames"
    if image.mode == "CMYK":
        yield "CMYK image"
    if image.mode in ("1", "L", "LA", "La"):
        yield "greyscale image"
    if image.mode in ("P", "PA"):
        yield "palette image"
    if min(image.size) == 1:
        yield "image of one pixel's width"
    if max(image.size) >= PANORAMA * min(image.size):
        yield "panorama"
    if max(image.size) >= LARGE_SIDE:
        yield "large image"
    if _or_one(lambda: image.getexif().get(_EXIF_ORIENTATION, 1)) in range(2, 9):
        yield "image turned by EXIF"


def _or_one(read: Callable[[], int]) -> int:
    """Return a number of the metadata, or 1 if it is missing or broken, as Detectron2 does."""
    try:
        return read()
    # Broken metadata raise anything.
    except Exception:
        return 1


def _is_object(annotation):
    has_ids = all(type(annotation.get(key)) in (int, str) for key in ("image_id", "category_id"))
    return has_ids and is_sound_box(annotation.get("bbox")) and not annotation.get("iscrowd")


def _notes(content, num_queries):
    """Yield notes on images and annotations that are used as they are."""
    boxes, crowds = defaultdict(list), defaultdict(list)
    for annotation in content["annotations"]:
        if type(annotation.get("image_id")) in (int, str) and is_sound_box(annotation.get("bbox")):
            (crowds if annotation.get("iscrowd") else boxes)[annotation["image_id"]].append(
                annotation
            )
    ids = [image["id"] for image in content["images"]]
    files = Counter(image.get("file_name") for image in content["images"] if has_file_name(image))
    repeated = [
        annotation["id"]
        for group in boxes.values()
        for annotation in _repeated([(str(a.get("category_id")), *a["bbox"]) for a in group], group)
    ]
    crowd_ids = [a["id"] for group in crowds.values() for a in group]
    for kind, where, text in (
        (
            "image without objects",
            [i for i in ids if i not in boxes and i not in crowds],
            "used as background in training and evaluation",
        ),
        (
            "image with crowd regions alone",
            [i for i in ids if i not in boxes and i in crowds],
            "used as background in training",
        ),
        (
            "crowd region",
            crowd_ids,
            "not an object in training; detections inside it do not count in evaluation",
        ),
        (
            "file listed twice",
            [name for name, count in files.items() if count > 1],
            "used once for each of its entries",
        ),
        (
            "annotation listed twice",
            repeated,
            "the same box and class in the same image: used, as two objects",
        ),
        (
            "image of more objects than queries",
            [i for i in ids if num_queries is not None and len(boxes[i]) > num_queries],
            f"used; at most {num_queries} of its objects are matched by a query (model.queries)",
        ),
    ):
        if where:
            message = f"{len(where)} x {kind}: {text}: {join_first(where, 5)}"
            yield Fault(kind, Outcome.USED, message, tuple(where))


def _repeated(keys, values):
    seen = set()
    for key, value in zip(keys, values):
        if key in seen:
            yield value
        seen.add(key)
