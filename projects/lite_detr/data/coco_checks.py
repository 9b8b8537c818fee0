"""Checks of a COCO-format dataset before training, where it would otherwise fail in the middle."""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ..errors import DatasetError
from ..labels import printable
from .coco_file import (
    MAX_AREA,
    SECTIONS,
    CocoSummary,
    clip_boxes,
    has_usable_area,
    is_sound_box,
    load_coco,
    shown,
)
from .faults import Fault, Outcome, join_first
from .masks import is_number, usable_mask

logger = logging.getLogger("lite_detr")

# COCO rounds coordinates to two decimals, so its boxes pass the border by up to 0.01 pixel twice
# over (corner and size). That is not worth a warning; the loader clips such boxes all the same.
ROUNDING = 0.05
# The kind of fault for which Detectron2's own loader drops an object.
MASK_WITHOUT_AREA = "mask without area"


def check_coco(json_file, image_root, for_evaluation=False) -> CocoSummary:
    """Check a COCO-format annotation file, and that the images it lists exist.

    Logs one warning for each kind of annotation that a run ignores or changes.

    Args:
        json_file: path of the annotation file.
        image_root: folder that the ``file_name`` of each image is relative to.
        for_evaluation: also check ``area``, which COCO's evaluation reads and training does not.

    Raises:
        DatasetError: something in it would stop a run.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    content = load_coco(json_file)
    report_faults(find_faults(json_file, image_root, content, for_evaluation))
    return summary_of(content)


def report_faults(faults: Iterable[Fault]) -> None:
    """Log faults as warnings; raise ``DatasetError`` for the first that is refused."""
    for fault in faults:
        if fault.outcome is Outcome.REFUSED:
            raise DatasetError(fault.message)
        logger.warning("%s", printable(fault.message))


def summary_of(content: dict) -> CocoSummary:
    """Return the summary of a file that has been checked."""
    categories = sorted(content["categories"], key=lambda category: category["id"])
    return CocoSummary(
        num_images=len(content["images"]),
        num_annotations=len(content["annotations"]),
        categories=tuple(category["name"] for category in categories),
        category_ids=tuple(category["id"] for category in categories),
        num_objects=count_objects(content),
    )


def count_objects(content: dict) -> int:
    """Return the number of annotations that training uses: boxes with an area, no crowds."""
    annotations = [a for a in content["annotations"] if not a.get("iscrowd")]
    sound, boxes, sizes = _sound_boxes(annotations, content["images"])
    return int(clip_boxes(boxes, sizes)[1].sum()) if sound else 0


def no_objects_reason(source: str, num_annotations: int, num_objects: int) -> str:
    """Return why a training set cannot be trained on; empty if it has objects."""
    if num_objects:
        return ""
    if not num_annotations:
        return f"{source}: 'annotations' is empty; training needs at least one"
    return (
        f"{source}: none of the annotations is an object with an area inside its image that is not "
        "a crowd region; training needs at least one"
    )


def find_faults(
    source: str,
    image_root: str,
    content: dict,
    for_evaluation: bool,
    in_catalog: bool = False,
) -> Iterator[Fault]:
    """Yield what is refused, lost or changed of a file from :func:`load_coco`, by kind.

    What is refused in one way is not examined in others, so that faults stand for themselves.

    Args:
        source: the file, or the dataset of Detectron2's catalog, for messages.
        image_root, for_evaluation: see :func:`check_coco`.
        content: the file.
        in_catalog: Detectron2's own functions load the dataset; they drop an object whose
            polygons are broken, fail on other broken masks, and do not need images' sizes.
    """
    images, annotations, categories = (content[key] for key in SECTIONS)
    for key in SECTIONS:
        yield from _repeated_ids(source, key, content[key])
    yield from _bad_names(source, categories)
    yield from _broken_images(source, images, needs_size=not in_catalog)
    yield from _missing_files(source, image_root, images)
    yield from _broken_annotations(source, annotations, images, categories)
    yield from _broken_masks(source, annotations, images, in_catalog)
    if for_evaluation:
        yield from _replaced_areas(source, annotations)
    yield from _changed_boxes(source, annotations, images)


def has_file_name(image: dict) -> bool:
    """Return whether an entry of 'images' names a file."""
    return isinstance(image.get("file_name"), str) and bool(image["file_name"])


def _refused(source, kind, entry, bad, problem):
    more = f" (and {len(bad) - 1} more like it)" if len(bad) > 1 else ""
    message = f"{source}: {entry} {bad[0]['id']} {problem}{more}"
    return Fault(kind, Outcome.REFUSED, message, tuple(record["id"] for record in bad))


def _repeated_ids(source, key, records):
    counts = Counter(record["id"] for record in records)
    if repeated := [record_id for record_id, count in counts.items() if count > 1]:
        yield Fault(
            f"repeated ids in '{key}'",
            Outcome.REFUSED,
            f"{source}: each id in '{key}' must occur once, but these occur more often: "
            f"{join_first(repeated)}; give each entry an id of its own",
            tuple(repeated),
        )


def _bad_names(source, categories):
    if bad := [c for c in categories if not _is_text(c.get("name"))]:
        problem = f"must have a 'name' that is a string, but it is {shown(bad[0].get('name'))}"
        yield _refused(source, "category without name", "category", bad, problem)
    ids_of = defaultdict(list)
    for category in categories:
        if _is_text(category.get("name")):
            ids_of[category["name"]].append(category["id"])
    if repeated := {name: ids for name, ids in ids_of.items() if len(ids) > 1}:
        name, ids = next(iter(repeated.items()))
        more = f" (and {len(repeated) - 1} more such names)" if len(repeated) > 1 else ""
        message = (
            f"{source}: {len(ids)} categories have the name {name!r}{more}, so that results by "
            f"class cannot be told apart: ids {join_first(ids)}; give each a name of its own"
        )
        where = tuple(i for ids in repeated.values() for i in ids)
        yield Fault("categories of the same name", Outcome.REFUSED, message, where)


def _is_text(value):
    """Return whether a value is a string that can be written to a file."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _broken_images(source, images, needs_size):
    if bad := [image for image in images if not has_file_name(image)]:
        name = shown(bad[0].get("file_name"))
        problem = f"must have a 'file_name' that is a string, but it is {name}"
        yield _refused(source, "image without file name", "image", bad, problem)
    if bad := [i for i in images if not _has_size(i) and (needs_size or _gives_size(i))]:
        width, height = bad[0].get("width"), bad[0].get("height")
        problem = (
            "must have a positive 'width' and 'height' in pixels, but they are "
            f"{shown(width)} and {shown(height)}"
        )
        yield _refused(source, "image without size", "image", bad, problem)


def _missing_files(source, image_root, images):
    if image_root and not os.path.isdir(image_root):
        message = (
            f"{source}: image folder {image_root} not found; "
            "give the folder that holds the images of this file"
        )
        yield Fault("missing image folder", Outcome.REFUSED, message, (image_root,))
        return
    names = [image["file_name"] for image in images if has_file_name(image)]
    if missing := find_missing(image_root, names):
        place = f" under {image_root}" if image_root else ""
        message = (
            f"{source}: {len(missing)} of {len(images)} image files not found{place}: "
            f"{join_first(missing, 3)}; give the folder that each 'file_name' is "
            "relative to, or remove these images from the file"
        )
        yield Fault("missing image file", Outcome.REFUSED, message, tuple(missing))


def find_missing(image_root: str, file_names: list[str]) -> list[str]:
    """Return the names without a regular file.

    Each folder is listed once: to ask for each file is slow on network disks.
    """
    names_by_folder = defaultdict(list)
    for name in file_names:
        names_by_folder[os.path.dirname(name)].append(name)
    missing = []
    for folder, names in names_by_folder.items():
        try:
            with os.scandir(os.path.join(image_root, folder) or ".") as entries:
                present = {entry.name for entry in entries if entry.is_file()}
        # ValueError: of names with a zero byte, or that no file system can hold.
        except (OSError, ValueError):
            present = set()
        missing += [name for name in names if os.path.basename(name) not in present]
    return missing


def _broken_annotations(source, annotations, images, categories):
    image_ids = {image["id"] for image in images}
    category_ids = {category["id"] for category in categories}
    listed = join_first(sorted(category_ids), 20)
    checks: tuple[tuple[str, Callable, Callable], ...] = (
        (
            "unlisted image",
            lambda a: not _is_listed(a.get("image_id"), image_ids),
            lambda a: (
                f"has image_id {shown(a.get('image_id'))}, which is not the id of any of the "
                f"{len(images)} entries of 'images'; add that image or remove the annotation"
            ),
        ),
        (
            "unlisted category",
            lambda a: not _is_listed(a.get("category_id"), category_ids),
            lambda a: (
                f"has category_id {shown(a.get('category_id'))}, which 'categories' does not list "
                f"(listed: {listed}); add that category or remove the annotation"
            ),
        ),
        (
            "malformed box",
            lambda a: not is_sound_box(a.get("bbox")),
            lambda a: (
                "must have a 'bbox' of four finite numbers, [x, y, width, height], but it is "
                f"{shown(a.get('bbox'))}; correct the box or remove the annotation"
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
            lambda a: f"must have 0 or 1 as 'iscrowd', but it is {shown(a['iscrowd'])}",
        ),
    )
    for kind, is_bad, problem in checks:
        if bad := [annotation for annotation in annotations if is_bad(annotation)]:
            yield _refused(source, kind, "annotation", bad, problem(bad[0]))


def _broken_masks(source, annotations, images, in_catalog):
    size_of = {i["id"]: (i["height"], i["width"]) for i in images if _has_size(i)}
    broken, dropped = [], []
    for annotation in annotations:
        mask = annotation.get("segmentation")
        size = size_of.get(annotation["image_id"]) if _has_id(annotation, "image_id") else None
        if not mask or size is None or usable_mask(mask, size) is not None:
            continue
        is_list = isinstance(mask, list) and all(isinstance(part, list) for part in mask)
        (dropped if in_catalog and is_list else broken).append(annotation)
    if in_catalog:
        keypoints = "keypoints"
        broken += [a for a in annotations if not _are_keypoints(a.get(keypoints))]
        if broken:
            problem = (
                "has a 'segmentation' or 'keypoints' that Detectron2 cannot read; correct or "
                "remove it, or register the dataset with lite_detr.data.coco.register_coco, which "
                "uses the box alone"
            )
            yield _refused(source, "malformed mask", "annotation", broken, problem)
    elif broken:
        ids = tuple(a["id"] for a in broken)
        message = (
            f"{source}: {len(ids)} annotation(s) whose 'segmentation' is neither polygons of three "
            "points or more nor a run-length code of the image's size, used with their box alone: "
            f"annotation ids {join_first(ids, 5)}"
        )
        yield Fault("malformed mask", Outcome.CHANGED, message, ids)
    if dropped:
        ids = tuple(a["id"] for a in dropped)
        message = (
            f"{source}: {len(ids)} annotation(s) whose polygons all have fewer than three points, "
            f"which Detectron2 ignores in training: annotation ids {join_first(ids, 5)}; remove "
            "'segmentation', or register the dataset with lite_detr.data.coco.register_coco, to "
            "keep the boxes"
        )
        yield Fault(MASK_WITHOUT_AREA, Outcome.LOST, message, ids)


def _are_keypoints(value):
    return not value or (isinstance(value, list) and all(map(is_number, value)))


def _replaced_areas(source, annotations):
    sound = [a for a in annotations if is_sound_box(a.get("bbox"))]
    if bad := [a for a in sound if not has_usable_area(a)]:
        message = (
            f"{source}: {len(bad)} annotation(s) whose 'area' is not a positive number of at most "
            f"{MAX_AREA:.0e} square pixels, evaluated with the area of their box: annotation ids "
            f"{join_first([a['id'] for a in bad], 5)}"
        )
        where = tuple(a["id"] for a in bad)
        yield Fault("unusable area in evaluation", Outcome.CHANGED, message, where)


def _sound_boxes(annotations, images):
    """Return the annotations with four finite numbers as box, with boxes and images' sizes.

    The size of an image that is unknown is infinite.
    """
    unknown = (np.inf, np.inf)
    size_of = {i["id"]: (i["width"], i["height"]) if _has_size(i) else unknown for i in images}
    sound = [
        a
        for a in annotations
        if is_sound_box(a.get("bbox")) and _is_listed(a.get("image_id"), size_of)
    ]
    boxes = np.array([a["bbox"] for a in sound], dtype=np.float64).reshape(-1, 4)
    sizes = np.array([size_of[a["image_id"]] for a in sound], dtype=np.float64).reshape(-1, 2)
    return sound, boxes, sizes


def _changed_boxes(source, annotations, images):
    sound, boxes, sizes = _sound_boxes(annotations, images)
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
            ids = join_first(found, 5)
            message = f"{source}: {len(found)} box(es) {problem}: annotation ids {ids}"
            yield Fault(kind, outcome, message, found)


def _gives_size(image):
    return "width" in image or "height" in image


def _has_size(image):
    return all(is_number(side) and side >= 1 for side in (image.get("width"), image.get("height")))


def _has_id(annotation, key):
    return type(annotation.get(key)) in (int, str)


def _is_listed(value, ids):
    # The type comes first because a list or an object cannot be looked up in a set.
    return type(value) in (int, str) and value in ids
