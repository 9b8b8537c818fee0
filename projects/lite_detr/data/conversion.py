"""COCO files for datasets in other forms: Pascal VOC, YOLO, Roboflow's exports, one COCO file."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..checkpoint.files import atomic_open
from ..errors import DatasetError, SaveError
from ..file_search import walk_files
from .coco_checks import find_faults, report_faults
from .coco_file import SECTIONS, load_coco, load_json
from .faults import join_first
from .label_folders import (
    DIFFICULT,
    read_voc_folder,
    read_yolo_folder,
    split_of_folders,
)

SPLITS = ("train", "val", "test")
ROBOFLOW_FILE = "_annotations.coco.json"
# Roboflow's copies of one picture: NAME.rf.HASH.jpg.
COPY = re.compile(r"\.rf\.[0-9A-Za-z]+(?=\.[^.]+$)")


@dataclass
class Conversion:
    """A dataset as COCO contents.

    Attributes:
        kind: the form that it was in.
        image_root: the folder that the names of the images are relative to.
        contents: of "train", "val" and perhaps "test".
        notes: what was changed, left out or chosen, a sentence each.
    """

    kind: str
    image_root: Path
    contents: dict[str, dict] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def convert_dataset(
    source: Path, images: Path | None = None, val_share: float = 0.2, seed: int = 0
) -> Conversion:
    """Read a dataset, and split it if it has no validation images.

    Args:
        source: a folder with Pascal VOC's or YOLO's labels, with Roboflow's COCO files, or with
            one COCO file; or a COCO file.
        images: the folder of a COCO file's images; None: that of the file, or ``images`` in it or
            beside it.
        val_share: the share of the images to validate on, if the dataset has none for it.
        seed: decides which they are; the choice for an image does not depend on other images.

    Raises:
        DatasetError: it is none of these, or is broken.
    """
    conversion = _read_file(source, images) if source.is_file() else _read_folder(source)
    contents = conversion.contents
    for split, content in contents.items():
        faults = find_faults(str(source), str(conversion.image_root), content, split != "train")
        report_faults(faults)
    if "train" not in contents:
        raise DatasetError(
            f"{source}: has images for {' and '.join(contents)}, but none for training"
        )
    if "val" not in contents:
        chosen = choose_images(contents["train"], val_share, seed)
        contents["train"], contents["val"] = split_content(contents["train"], chosen)
        conversion.notes.append(
            f"{len(chosen)} images are for validation, chosen by --seed {seed}: the same each time"
        )
    for split, content in contents.items():
        for annotation in content["annotations"]:
            if annotation.pop(DIFFICULT, False) and split != "train":
                annotation["iscrowd"] = 1
    conversion.contents = {split: contents[split] for split in SPLITS if split in contents}
    conversion.notes += _missing_classes(conversion.contents)
    return conversion


def _read_folder(source: Path) -> Conversion:
    files = sorted(walk_files(source))
    if json_files := [path for path in files if path.name == ROBOFLOW_FILE]:
        return _read_roboflow(source, json_files)
    if found := read_voc_folder(source, files) or read_yolo_folder(source, files):
        return Conversion(found.kind, source, found.contents, found.notes)
    json_files = [path for path in files if path.suffix.lower() == ".json" and _is_coco(path)]
    if len(json_files) == 1:
        return _read_file(json_files[0], None, files)
    if json_files:
        raise DatasetError(
            f"{source}: has {len(json_files)} COCO files, {join_first(json_files, 3)}: give them "
            "to data.train_json and data.val_json as they are, or one of them to be split"
        )
    raise DatasetError(
        f"{source}: no image has labels. Expected are NAME.xml (Pascal VOC) or NAME.txt (YOLO) for "
        "NAME.jpg, beside it or in a folder `labels` or `Annotations` beside `images`; or a COCO "
        "file"
    )


def _is_coco(path: Path) -> bool:
    try:
        return all(section in load_json(str(path)) for section in SECTIONS)
    except DatasetError:
        return False


def _read_file(json_file: Path, images: Path | None, files: Sequence[Path] = ()) -> Conversion:
    """Read a COCO file, whose images are in a folder or among files."""
    content = load_coco(str(json_file))
    for image in content["images"]:
        if isinstance(image.get("file_name"), str):
            # Of programs on Windows.
            image["file_name"] = image["file_name"].replace("\\", "/")
    root = images or _find_images(json_file, str(content["images"][0].get("file_name")), files)
    return Conversion("COCO", root, {"train": content})


def write_conversion(conversion: Conversion, folder: Path) -> dict[str, Path]:
    """Write ``train.json``, ``val.json`` and perhaps ``test.json``; return their paths.

    Args:
        conversion: what to write.
        folder: an existing folder.

    Raises:
        SaveError: one of them exists, or cannot be written.
    """
    paths = {split: folder / f"{split}.json" for split in conversion.contents}
    for path in paths.values():
        if path.exists():
            raise SaveError(f"{path} exists: give another --output, or remove it")
    for split, path in paths.items():
        with atomic_open(path, "w") as file:
            json.dump(conversion.contents[split], file)
    return paths


def choose_images(content: dict, share: float, seed: int) -> set:
    """Return the ids of the images for validation: copies of one picture stay together.

    Raises:
        DatasetError: nothing would be left for one of the two.
    """
    groups = defaultdict(list)
    for image in content["images"]:
        groups[COPY.sub("", str(image.get("file_name")))].append(image["id"])
    order = sorted(groups, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    number = max(round(share * len(order)), 1)
    if number >= len(order):
        raise DatasetError(
            f"{len(order)} picture(s) cannot be split, with {number} for validation: give more, or "
            "a smaller --val-share"
        )
    return {i for name in order[:number] for i in groups[name]}


def split_content(content: dict, chosen: set) -> tuple[dict, dict]:
    """Return two COCO contents: that without the chosen images, and that of them."""
    halves = []
    for is_chosen in (False, True):
        images = [i for i in content["images"] if (i["id"] in chosen) is is_chosen]
        ids = {image["id"] for image in images}
        annotations = [a for a in content["annotations"] if a["image_id"] in ids]
        halves.append({**content, "images": images, "annotations": annotations})
    return halves[0], halves[1]


def _missing_classes(contents: Mapping[str, dict]) -> Iterator[str]:
    for split, content in contents.items():
        used = {a["category_id"] for a in content["annotations"]}
        names = [c["name"] for c in content["categories"] if c["id"] not in used]
        if names and split != "test":
            yield f"{len(names)} classes have no object in {split}.json: {join_first(names, 5)}"


def _find_images(json_file: Path, name: str, files: Sequence[Path]) -> Path:
    """Return the folder in which a COCO file's image is, beside the file or among files."""
    folder = json_file.parent
    places = [folder, folder / "images", folder.parent / "images", folder.parent]
    num_parts = len(PurePosixPath(name).parts)
    places += [path.parents[num_parts - 1] for path in files if path.name == Path(name).name]
    for place in places:
        if (place / name).is_file():
            return place
    raise DatasetError(f"{json_file}: its image {name} is not beside it: give --images DIR")


def _read_roboflow(root: Path, json_files: Sequence[Path]) -> Conversion:
    """Read a folder of splits, each with a COCO file among its images."""
    conversion = Conversion("COCO (Roboflow)", root)
    for path in json_files:
        content = load_coco(str(path))
        folder = path.parent.relative_to(root)
        split = split_of_folders(folder.parts) or "train"
        if split in conversion.contents:
            raise DatasetError(f"{root}: has two files {ROBOFLOW_FILE} for {split}: {path}")
        for image in content["images"]:
            image["file_name"] = (folder / str(image.get("file_name"))).as_posix()
        conversion.contents[split] = content
    contents = conversion.contents.values()
    used = {a.get("category_id") for content in contents for a in content["annotations"]}
    for content in contents:
        # Roboflow lists the group of all classes as a class of its own.
        groups = {c.get("supercategory") for c in content["categories"]}
        content["categories"] = [
            c for c in content["categories"] if c["id"] in used or c.get("name") not in groups
        ]
    return conversion
