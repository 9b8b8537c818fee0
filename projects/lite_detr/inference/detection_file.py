"""The JSON file of detections that programs read."""

import json
from collections.abc import Sequence
from pathlib import Path

from detectron2.structures import Instances


class DetectionFile:
    """A JSON list with one object, and one line, for each image or frame of a video.

    An image has ``file_name``, ``height``, ``width`` and ``detections``, best first, each with
    ``class``, ``score`` and ``box``: x1, y1, x2, y2 in pixels. A frame also has its number
    ``frame``, from 0, and its ``time`` in seconds. Objects that are tracked have a ``track``: their
    number, or null until they are seen again. A file that cannot be used has a ``problem`` instead.
    Lines are written one by one and the list is always closed, so that the results of an
    interrupted run can be read.

    Args:
        path: of the file, which is replaced.
        classes: names by number; None writes the numbers.
    """

    def __init__(self, path: Path, classes: Sequence[str] | None):
        self.file = path.open("w", encoding="utf-8")
        self.classes = classes
        self.separator = "[\n"

    def __enter__(self) -> "DetectionFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.write("[]\n" if self.separator == "[\n" else "\n]\n")
        self.file.close()

    def add(self, name: object, instances: Instances, **where: float) -> None:
        """Add the detections of an image.

        Args:
            name: of its file.
            instances: on the CPU, with boxes in pixels of the image.
            where: the ``frame`` and ``time`` in a video.
        """
        height, width = instances.image_size
        detections = [
            {
                "class": number if self.classes is None else self.classes[number],
                "score": round(score, 5),
                "box": [round(corner, 2) for corner in box],
            }
            for number, score, box in zip(
                instances.pred_classes.tolist(),
                instances.scores.tolist(),
                instances.pred_boxes.tensor.tolist(),
            )
        ]
        if instances.has("track_ids"):
            for detection, number in zip(detections, instances.track_ids.tolist()):
                detection["track"] = number if number > 0 else None
        size = {"height": height, "width": width}
        self._write({"file_name": str(name)} | where | size | {"detections": detections})

    def add_problem(self, name: object, problem: str) -> None:
        """Add a file that cannot be used, and why."""
        self._write({"file_name": str(name), "problem": problem})

    def _write(self, entry: dict) -> None:
        line = json.dumps(entry, ensure_ascii=False)
        # Bytes that are not UTF-8 in the name of a file, which os.fsencode restores.
        if any("\ud800" <= character <= "\udfff" for character in line):
            line = json.dumps(entry)
        self.file.write(self.separator + line)
        self.separator = ",\n"
