"""Detections as a JSON file, for programs."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from lite_detr.inference.predictor import FilePrediction


class DetectionFile:
    """A JSON list with an object, and a line, for each image.

    An image has ``file_name``, ``height``, ``width`` and ``detections``, best first, each with
    ``class``, ``score`` and ``box``: x1, y1, x2, y2 in pixels. A file that cannot be used has a
    ``problem`` in place of them. Lines are written as they come, and the list is closed whatever
    happens: what an interrupted run has found can be read.

    Args:
        path: of the file; its folder is made, and what it held is replaced.
        classes: names by number; None writes the numbers.
    """

    def __init__(self, path: Path, classes: Sequence[str] | None):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", encoding="utf-8")
        self.classes = classes
        self.separator = "[\n"

    def __enter__(self) -> "DetectionFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.file.write("[]\n" if self.separator == "[\n" else "\n]\n")
        self.file.close()

    def add(self, prediction: FilePrediction) -> None:
        self.file.write(self.separator + json.dumps(self._entry(prediction), ensure_ascii=False))
        self.separator = ",\n"

    def _entry(self, prediction: FilePrediction) -> dict:
        entry: dict = {"file_name": str(prediction.path)}
        instances = prediction.instances
        if instances is None:
            return entry | {"problem": prediction.problem}
        entry["height"], entry["width"] = instances.image_size
        entry["detections"] = [
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
        return entry
