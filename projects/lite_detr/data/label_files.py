"""Pascal VOC's and YOLO's files of labels, one for each image, and the names of YOLO's classes."""

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import DatasetError
from .coco_file import shown

# A share of the image's side above which a number cannot be one, and is taken for pixels.
MAX_SHARE = 2.0
# Files with the names of YOLO's classes, one on each line, besides data.yaml.
NAME_FILES = ("classes.txt", "obj.names")


class Labelled(NamedTuple):
    """An object in a file of labels.

    Attributes:
        name: of its class.
        corners: x1, y1, x2, y2; in pixels as they are in Pascal VOC, in YOLO as shares of the
            image's width and height.
        difficult: Pascal VOC's flag: evaluation does not count the object.
        is_polygon: the corners are those of the upright box around a polygon, which may be a
            rotated box.
    """

    name: str
    corners: tuple[float, float, float, float]
    difficult: bool = False
    is_polygon: bool = False


class VocFile(NamedTuple):
    """The contents of one of Pascal VOC's XML files; a size that is not given is 0."""

    width: int
    height: int
    objects: list[Labelled]


class YoloClasses(NamedTuple):
    """The classes of a YOLO dataset.

    Attributes:
        names: by number.
        source: the file that has them.
        num_keypoint_values: numbers that follow the box in a label of keypoints.
        folders: ``data.yaml``'s entries for train, val and test.
    """

    names: dict[int, str]
    source: Path
    num_keypoint_values: int = 0
    folders: dict[str, list[str]] = {}


def read_voc(path: Path) -> VocFile | None:
    """Read one of Pascal VOC's files; None if it is XML of another kind.

    Raises:
        DatasetError: it is broken.
    """
    try:
        root = ET.parse(path).getroot()
    # A declared encoding may be unknown, or of a kind that the parser does not know.
    except (ET.ParseError, LookupError, ValueError, OSError) as error:
        raise DatasetError(f"{path}: not valid XML ({error})") from None
    if root.tag != "annotation":
        return None
    width, height = (_voc_side(root, side) for side in ("width", "height"))
    return VocFile(width, height, [_voc_object(path, entry) for entry in root.findall("object")])


def _voc_side(root: ET.Element, side: str) -> int:
    try:
        return max(int(float(root.findtext(f"size/{side}") or 0)), 0)
    except (ValueError, OverflowError):
        return 0


def _voc_object(path: Path, entry: ET.Element) -> Labelled:
    name = (entry.findtext("name") or "").strip()
    if not name:
        raise DatasetError(f"{path}: an object has no <name>")
    box = entry.find("bndbox")
    if box is None:
        is_rotated = entry.find("robndbox") is not None
        hint = ", but a rotated <robndbox>: detectors here find upright boxes" if is_rotated else ""
        raise DatasetError(f"{path}: an object {name!r} has no <bndbox>{hint}")
    corners = []
    for corner in ("xmin", "ymin", "xmax", "ymax"):
        text = box.findtext(corner)
        value = _number(text)
        if value is None:
            raise DatasetError(f"{path}: an object {name!r} has {shown(text)} as <{corner}>")
        corners.append(value)
    x1, y1, x2, y2 = corners
    ordered = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    return Labelled(name, ordered, (entry.findtext("difficult") or "").strip() == "1")


def read_yolo(path: Path, classes: YoloClasses) -> Iterator[Labelled | DatasetError]:
    """Yield the objects in a YOLO file, and an error for each line that is broken.

    A line has a class and a box (center, width and height), which a confidence or keypoints may
    follow; or a class and a polygon, whose box is used.
    """
    try:
        # Windows' editors put a mark at the beginning.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        yield DatasetError(f"{path}: cannot be read as text ({error})")
        return
    for number, line in enumerate(lines, start=1):
        if words := line.split():
            try:
                yield _yolo_object(words, classes)
            except DatasetError as error:
                yield DatasetError(f"{path}, line {number}: {error}")


def _yolo_object(words: list[str], classes: YoloClasses) -> Labelled:
    numbers = [_number(word) for word in words]
    if None in numbers or len(numbers) < 5:
        raise DatasetError(
            "a label is a class and four numbers or more, all finite, such as 0 0.5 0.5 0.2 0.1; "
            f"given {shown(' '.join(words))}"
        )
    kind, values = numbers[0], numbers[1:]
    if kind not in classes.names:
        raise DatasetError(
            f"class {words[0]} is none of the {len(classes.names)} classes in {classes.source}, "
            f"which are {min(classes.names)} to {max(classes.names)}"
        )
    is_box = len(values) <= 5 or len(values) == 4 + classes.num_keypoint_values
    # A confidence may follow a polygon as well.
    values = values[:4] if is_box else values[: len(values) // 2 * 2]
    if max(map(abs, values)) > MAX_SHARE:
        raise DatasetError(
            f"numbers are shares of the image's width and height, from 0 to 1; given {words[1]}"
            f"{''.join(f' {word}' for word in words[2:5])}, which look like pixels"
        )
    if not is_box:
        xs, ys = values[::2], values[1::2]
        corners = (min(xs), min(ys), max(xs), max(ys))
        return Labelled(classes.names[kind], corners, is_polygon=True)
    x, y, width, height = values
    if min(width, height) < 0:
        raise DatasetError(f"width and height must not be negative, given {words[3]} {words[4]}")
    corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    return Labelled(classes.names[kind], corners)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_classes(files: list[Path]) -> YoloClasses:
    """Find and read the names of the classes of a YOLO dataset.

    Args:
        files: all files of the dataset's folder.

    Raises:
        DatasetError: there are none, or they cannot be read.
    """
    documents = [path for path in files if path.suffix.lower() in (".yaml", ".yml")]
    documents.sort(key=lambda path: (path.stem.lower() != "data", len(path.parts)))
    for path in documents:
        content = _load_yaml(path)
        if isinstance(content, dict) and content.get("names"):
            return YoloClasses(
                _names_by_number(path, content["names"]),
                path,
                _num_keypoint_values(content.get("kpt_shape")),
                _split_folders(content),
            )
    lists = [path for path in files if path.name.lower() in NAME_FILES]
    for path in sorted(lists, key=lambda path: len(path.parts)):
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{path}: cannot be read as text ({error})") from None
        names = [line.strip() for line in lines]
        while names and not names[-1]:
            names.pop()
        if names:
            return YoloClasses(_names_by_number(path, names), path)
    raise DatasetError(
        "the labels are YOLO's, which name classes by numbers, and nothing says their names: put a "
        "classes.txt with a name on each line, or a data.yaml with `names: [...]`, into the folder"
    )


def _load_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DatasetError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None


def _names_by_number(path: Path, names: Any) -> dict[int, str]:
    """Return the names of a list, or of a mapping from numbers."""
    items = names.items() if isinstance(names, dict) else enumerate(names)
    if not isinstance(names, (dict, list)):
        raise DatasetError(f"{path}: 'names' must be a list of names, but is {shown(names)}")
    found = {}
    for number, name in items:
        if not str(number).isdecimal() or isinstance(name, (dict, list)) or name is None:
            raise DatasetError(
                f"{path}: 'names' must be a list of names, or name each number, but has "
                f"{shown(number)}: {shown(name)}"
            )
        found[int(number)] = str(name)
    return found


def _num_keypoint_values(shape: Any) -> int:
    is_shape = isinstance(shape, list) and all(type(size) is int for size in shape)
    return math.prod(shape) if shape and is_shape else 0


def _split_folders(content: dict) -> dict[str, list[str]]:
    """Return what ``data.yaml`` names for each split: folders, or files that list images."""
    root, found = content.get("path"), {}
    for split in ("train", "val", "test"):
        given = content.get(split)
        given = given if isinstance(given, list) else [given]
        names = [name for name in given if isinstance(name, str) and name]
        if isinstance(root, str):
            names += [f"{root}/{name}" for name in names]
        found[split] = names
    return found
