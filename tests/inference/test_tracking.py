"""Objects of a video keep their number, with a stub that knows where they are."""

import json
import sys

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances

from lite_detr.errors import MissingPackageError
from lite_detr.inference.predictor import FramePrediction
from lite_detr.inference.runs import Run
from lite_detr.inference.tracking import UNTRACKED, load_trackers, track
from lite_detr.inference.video import Frame, VideoReader, VideoWriter

SIDE = 30


def places(number):
    """Two objects that pass each other, one above the other, and one that comes late."""
    shown = {"right": (10 + 8 * number, 40), "left": (290 - 8 * number, 60)}
    if number >= 10:
        shown["late"] = (200, 150 + 2 * (number - 10))
    # For a moment one is not found.
    if 14 <= number < 18:
        del shown["right"]
    return shown


def predict(frame):
    """The detections of a frame, in an order that changes."""
    shown = list(places(frame.number).values())
    shown = shown[frame.number % 2 :] + shown[: frame.number % 2]
    boxes = torch.tensor([(x, y, x + SIDE, y + SIDE) for x, y in shown]).float()
    instances = Instances((240, 320))
    instances.pred_boxes = Boxes(boxes)
    instances.scores = torch.linspace(0.9, 0.4, len(boxes))
    instances.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
    return FramePrediction(frame, instances, 0.9)


class KnowsThem:
    metadata = Metadata(thing_classes=["square"])

    def predict_frames(self, frames, batch_size=1):
        return map(predict, frames)


def frames(count):
    return [
        Frame(number, number / 25, np.zeros((240, 320, 3), np.uint8)) for number in range(count)
    ]


def name_of(number, box):
    """The name of the object in a box."""
    return {place: name for name, place in places(number).items()}[tuple(map(int, box[:2]))]


def test_each_object_has_one_number_in_all_frames():
    pytest.importorskip("trackers")
    numbers, unconfirmed = {}, []
    for prediction in track(map(predict, frames(32)), rate=25.0, threshold=0.3):
        instances = prediction.instances
        for box, number in zip(instances.pred_boxes.tensor.tolist(), instances.track_ids.tolist()):
            name = name_of(prediction.frame.number, box)
            if number == UNTRACKED:
                unconfirmed.append((prediction.frame.number, name))
            else:
                numbers.setdefault(name, set()).add(number)
    assert sorted(numbers) == ["late", "left", "right"]
    assert sorted(map(sorted, numbers.values())) == [[1], [2], [3]]
    # Each in its first frame.
    assert sorted(unconfirmed) == [(0, "left"), (0, "right"), (10, "late")]


def test_frames_without_objects():
    pytest.importorskip("trackers")
    nothing = predict(frames(1)[0]).instances[:0]
    predictions = [FramePrediction(frame, nothing, None) for frame in frames(2)]
    tracked = track([*predictions, *map(predict, frames(3))], rate=25.0, threshold=0.3)
    numbers = [sorted(each.instances.track_ids.tolist()) for each in tracked]
    assert numbers == [[], [], [UNTRACKED] * 2, [1, 2], [1, 2]]


def test_numbers_are_written_for_programs_and_drawn(tmp_path):
    pytest.importorskip("trackers")
    clip = tmp_path / "clip.avi"
    with VideoWriter(clip, 25.0) as writer:
        for frame in frames(3):
            writer.write(frame)
    results = {}
    for threshold in (None, 0.3):
        output, lines = tmp_path / f"{threshold}.avi", tmp_path / f"{threshold}.json"
        with (
            Run(KnowsThem(), lines, track_threshold=threshold) as run,
            VideoReader(writer.path) as video,
        ):
            run.predict_video(video, output)
        with VideoReader(next(tmp_path.glob(f"{threshold}.avi*"))) as drawn:
            pixels = [frame.image.astype(int) for frame in drawn]
        results[threshold] = json.loads(lines.read_text()), pixels
    (plain, before), (tracked, after) = results.values()
    assert all("track" not in found for line in plain for found in line["detections"])
    for line in tracked:
        numbers = {name_of(line["frame"], f["box"]): f["track"] for f in line["detections"]}
        assert set(numbers) == {"right", "left"}
        assert set(numbers.values()) == ({1, 2} if line["frame"] else {None})
    # The labels differ as soon as there are numbers.
    differences = [np.abs(a - b).max() for a, b in zip(before, after)]
    assert differences[0] < 20 and min(differences[1:]) > 100


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingPackageError, match="tracking needs ByteTrack .*pip install tracker"):
        load_trackers()
