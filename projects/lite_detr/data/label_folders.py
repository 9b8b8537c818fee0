"""Folders with Pascal VOC's or YOLO's files of labels, read as COCO contents for each split."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DatasetError
from .coco_checks import ROUNDING
from .coco_file import clip_boxes
from .faults import join_first
from .image_files import IMAGE_FORMATS
from .label_files import NAME_FILES, Labelled, YoloClasses, read_classes, read_voc, read_yolo

IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .png .pgm .ppm .tif .tiff .webp".split()
)
# Folders that only say what is in them: an image and its labels agree in the others.
KIND_FOLDERS = frozenset(
    "annotation annotations image images img imgs jpegimages label labels txt xml xmls".split()
)
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# A key of annotations until they are split: Detectron2 also trains on such objects of Pascal VOC.
DIFFICULT = "_difficult"
EXIF_ORIENTATION = 274
# Text files of YOLO datasets that hold no labels.
NO_LABELS = re.compile(r"(train|val|valid|test|classes|labels|notes|readme.*|requirements)\.txt")


@dataclass(frozen=True)
class FolderContents:
    """A folder as COCO contents, whose images' names are relative to it.

    Attributes:
        kind: the form that it has.
        contents: of "train", "val" and "test", as far as there are images for them.
        notes: what was changed or left out, a sentence each.
    """

    kind: str
    contents: dict[str, dict]
    notes: list[str]


@dataclass
class Found:
    """The findings of reading a folder, for notes: by kind, a file's name for each case."""

    places: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, place: object) -> None:
        self.places[kind].append(str(place))

    def notes(self) -> Iterator[str]:
        for kind, places in self.places.items():
            names = list(dict.fromkeys(places))
            yield f"{len(places)} {kind}: {join_first(names, 3)}"


def read_voc_folder(root: Path, files: Sequence[Path]) -> FolderContents | None:
    """Read a folder with Pascal VOC's files; None if it has none."""
    found, faults, labels, paths = Found(), [], {}, {}
    for path in [path for path in files if path.suffix.lower() == ".xml"]:
        try:
            label = read_voc(path)
        except DatasetError as error:
            faults.append(error)
            continue
        if label is not None:
            labels[_pair(path, root)], paths[_pair(path, root)] = label, path
    _raise_first(faults)
    if not labels:
        return None
    objects = [entry for label in labels.values() for entry in label.objects]
    # Pascal VOC counts pixels from 1, and some programs from 0.
    first = 0 if any(0 <= min(entry.corners[:2]) < 1 for entry in objects) else 1
    if first == 0:
        found.add("dataset whose boxes count pixels from 0, not from 1 as Pascal VOC's", root)
    names = sorted({entry.name for entry in objects})
    builder = Builder(root, names, found)
    splits = _listed_splits(p for p in files if "ImageSets" in p.parts)
    for path in _images(files):
        # Pascal VOC's masks are images as well.
        if path.parent.name.startswith("Segmentation"):
            continue
        if (label := labels.get(_pair(path, root))) is None:
            found.add("image(s) without an XML file, left out", path.relative_to(root))
            continue
        paths.pop(_pair(path, root), None)
        size = (label.width, label.height) if label.width and label.height else None
        objects = [_shift(entry, first) for entry in label.objects]
        builder.add(path, objects, splits.get(path.stem), size)
    for path in paths.values():
        found.add("XML file(s) without an image, left out", path.relative_to(root))
    return builder.finish("Pascal VOC")


def _shift(entry: Labelled, first: int) -> Labelled:
    x1, y1, x2, y2 = entry.corners
    # The last pixel is inside the box, so its number from 1 on is the box's end.
    return entry._replace(corners=(x1 - first, y1 - first, x2, y2))


def read_yolo_folder(root: Path, files: Sequence[Path]) -> FolderContents | None:
    """Read a folder with YOLO's files; None if it has none that belongs to an image."""
    images = list(_images(files))
    pairs = {_pair(path, root) for path in images}
    texts = [p for p in files if p.suffix.lower() == ".txt" and p.name.lower() not in NAME_FILES]
    labels = {_pair(path, root): path for path in texts}
    if not pairs & labels.keys():
        return None
    classes = read_classes(list(files))
    found, faults = Found(), []
    builder = Builder(root, [classes.names[n] for n in sorted(classes.names)], found)
    splits = _yaml_splits(classes, images)
    for path in images:
        label = labels.get(_pair(path, root))
        objects = list(read_yolo(label, classes)) if label else []
        faults += [entry for entry in objects if isinstance(entry, DatasetError)]
        if label is None:
            found.add(
                "image(s) without a label file, used as without objects", path.relative_to(root)
            )
        if (size := builder.size(path)) is not None and not faults:
            scale = size * 2
            pixels = [
                entry._replace(corners=tuple(np.multiply(entry.corners, scale).tolist()))
                for entry in objects
            ]
            builder.add(path, pixels, splits.get(path), size)
    _raise_first(faults)
    for pair, path in labels.items():
        if pair not in pairs and not NO_LABELS.fullmatch(path.name.lower()):
            found.add("label file(s) without an image, left out", path.relative_to(root))
    return builder.finish("YOLO")


class Builder:
    """Collects images and their objects into COCO contents.

    Args:
        root: the dataset's folder.
        names: of the classes, in their order.
        found: receives what is left out.
    """

    def __init__(self, root: Path, names: Sequence[str], found: Found):
        self.root, self.names, self.found = root, list(names), found
        self.category_ids: dict[str, int] = {}
        for number, name in enumerate(self.names, start=1):
            # Of classes with the same name, the first counts.
            self.category_ids.setdefault(name, number)
        self.images: dict[str | None, list[dict]] = defaultdict(list)
        self.annotations: dict[str | None, list[dict]] = defaultdict(list)
        self.num_images = self.num_annotations = 0

    def size(self, path: Path) -> tuple[int, int] | None:
        """Return the width and height of an image, upright; None if it cannot be read."""
        try:
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
                return image.size[::-1] if turned else image.size
        # Pillow's readers raise anything on a broken file.
        except Exception:
            self.found.add("image(s) that cannot be read, left out", path.relative_to(self.root))
            return None

    def add(
        self,
        path: Path,
        objects: Iterable[Labelled],
        split: str | None,
        size: tuple[int, int] | None,
    ) -> None:
        """Add an image.

        Args:
            path: of the file.
            objects: with corners in pixels.
            split: None: as its folders say.
            size: width and height; None: that of the file.
        """
        size = size or self.size(path)
        if size is None:
            return
        name = path.relative_to(self.root)
        split = split or split_of_folders(name.parent.parts)
        self.num_images += 1
        self.images[split].append(
            {
                "id": self.num_images,
                "file_name": name.as_posix(),
                "width": size[0],
                "height": size[1],
            }
        )
        for entry in objects:
            x1, y1, x2, y2 = entry.corners
            box = np.array([[x1, y1, x2 - x1, y2 - y1]])
            clipped, usable = clip_boxes(box, np.array([size], dtype=np.float64))
            if not usable[0]:
                self.found.add("box(es) without an area in the image, left out", name)
                continue
            if np.abs(clipped - box).max() > ROUNDING:
                self.found.add("box(es) reaching outside the image, clipped to it", name)
            self.num_annotations += 1
            width, height = clipped[0, 2:].tolist()
            if entry.difficult:
                self.found.add("object(s) marked difficult, of which evaluation counts none", name)
            if entry.is_polygon:
                self.found.add("polygon(s) or rotated box(es), used as upright boxes", name)
            self.annotations[split].append(
                {
                    "id": self.num_annotations,
                    "image_id": self.num_images,
                    "category_id": self.category_ids[entry.name],
                    "bbox": clipped[0].tolist(),
                    "area": width * height,
                    "iscrowd": 0,
                    DIFFICULT: entry.difficult,
                }
            )

    def finish(self, kind: str) -> FolderContents:
        """Return the contents of the splits; images of no split are for training."""
        if not self.num_images:
            raise DatasetError(f"{self.root}: none of its label files belongs to an image")
        if None in self.images and "train" in self.images:
            for image in self.images.pop(None):
                self.found.add(
                    "image(s) outside the folders of splits, left out", image["file_name"]
                )
            self.annotations.pop(None, None)
        categories = [{"id": i, "name": name} for i, name in enumerate(self.names, start=1)]
        contents = {
            split or "train": {
                "images": images,
                "annotations": self.annotations[split],
                "categories": categories,
            }
            for split, images in self.images.items()
        }
        return FolderContents(kind, contents, list(self.found.notes()))


def _images(files: Iterable[Path]) -> Iterator[Path]:
    return (path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)


def _pair(path: Path, root: Path) -> tuple[str, ...]:
    """Return what an image and its file of labels have in common."""
    folders = path.parent.relative_to(root).parts
    return (*(folder for folder in folders if folder.lower() not in KIND_FOLDERS), path.stem)


def split_of_folders(folders: Sequence[str]) -> str | None:
    """Return the split that the innermost folder says, such as ``valid`` or ``train2017``."""
    for folder in reversed(folders):
        for word in re.split(r"[^a-z]+", folder.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None


def _listed_splits(files: Iterable[Path]) -> dict[str, str]:
    """Return the splits of Pascal VOC's ``ImageSets/Main``, by the images' names."""
    by_name = {path.stem: path for path in files if path.suffix == ".txt"}
    splits: dict[str, str] = {}
    # A later one counts: what is for training and validation alike is for training.
    order = {"test": "test", "trainval": "train", "val": "val", "train": "train"}
    for path, split in ((by_name[stem], split) for stem, split in order.items() if stem in by_name):
        for words in map(str.split, _lines(path)):
            name = Path(words[0]) if words else Path()
            # A name may have a point, and rarely a suffix.
            is_file = name.suffix.lower() in IMAGE_SUFFIXES
            splits[name.stem if is_file else name.name] = split
    return splits


def _yaml_splits(classes: YoloClasses, images: Iterable[Path]) -> dict[Path, str]:
    """Return the splits of ``data.yaml``, for images in folders or lists that it names."""
    base, splits = classes.source.parent, defaultdict(set)
    folders_above = {path: path.resolve().parents for path in images}
    for split, names in classes.folders.items():
        for name in names:
            # Roboflow's exports begin with ../ from the file's own folder.
            for place in (base / name, base / re.sub(r"^(\.\./)+", "", name)):
                if chosen := _images_at(place, folders_above):
                    break
            for path in chosen:
                splits[path].add(split)
    # The same images for training and validation are no split.
    return {path: names.pop() for path, names in splits.items() if len(names) == 1}


def _images_at(place: Path, folders_above: Mapping[Path, Sequence[Path]]) -> list[Path]:
    """Return the images in a folder, or those that a file lists.

    Args:
        place: the folder or file.
        folders_above: all folders that each image is in, without links.
    """
    if place.is_file():
        listed = {Path(line.strip()).name for line in _lines(place)}
        return [path for path in folders_above if path.name in listed]
    folder = place.resolve()
    return [path for path, folders in folders_above.items() if folder in folders]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8-sig", errors="replace").splitlines()


def _raise_first(faults: Sequence[DatasetError]) -> None:
    if faults:
        more = f" (and {len(faults) - 1} more faults in label files)" if faults[1:] else ""
        raise DatasetError(f"{faults[0]}{more}")
