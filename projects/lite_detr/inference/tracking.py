"""Objects that keep their number from frame to frame of a video, by ByteTrack."""

import dataclasses
from collections.abc import Iterable, Iterator
from types import ModuleType

import numpy as np
import torch

from ..errors import MissingPackageError
from .predictor import FramePrediction

# The number of an object that has not been seen before.
UNTRACKED = -1
# Relative to the detector's threshold: detections that score so much follow a known object.
FOLLOWS = 1 / 3
# Boxes that overlap more are one object, whatever their classes: a query may have several.
SAME_OBJECT_IOU = 0.6


def load_trackers() -> tuple[ModuleType, ModuleType]:
    """Import supervision and trackers.

    Raises:
        MissingPackageError: one is not installed.
    """
    try:
        import supervision
        import trackers
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"tracking needs ByteTrack ({error.name} is missing): run `pip install trackers`"
        ) from None
    return supervision, trackers


def track(
    predictions: Iterable[FramePrediction], rate: float, threshold: float
) -> Iterator[FramePrediction]:
    """Yield the predictions of a video's frames with ``track_ids`` in their instances.

    Detections that reach the threshold begin a track. Those below remain only if they continue
    one, which bridges frames in which the detector is less sure. Of several on one object, the best
    remains.

    An object has the same number, from 1 on, in all frames but its first, where nothing tells it
    from a false detection yet: there it is ``UNTRACKED``. It may be missed for a second, and its
    class may change. Other trackers of the ``trackers`` package take
    ``supervision.Detections.from_detectron2({"instances": instances})`` as this one does.

    Args:
        predictions: of the frames, in order, with detections that score ``FOLLOWS * threshold``.
        rate: frames per second.
        threshold: the least score of an object that is new.

    Raises:
        MissingPackageError: see :func:`load_trackers`.
    """
    supervision, trackers = load_trackers()
    tracker = trackers.ByteTrackTracker(
        frame_rate=rate,
        track_activation_threshold=threshold,
        high_conf_det_threshold=threshold,
        minimum_consecutive_frames=1,
    )
    for prediction in predictions:
        instances = prediction.instances
        detections = supervision.Detections.from_detectron2({"instances": instances})
        # The tracker returns them in another order.
        detections.data["position"] = np.arange(len(instances))
        tracked = tracker.update(detections.with_nms(SAME_OBJECT_IOU, class_agnostic=True))
        instances = instances[torch.from_numpy(tracked.data["position"]) if len(tracked) else []]
        numbers = torch.from_numpy(tracked.tracker_id)
        instances.track_ids = torch.where(numbers >= 0, numbers + 1, UNTRACKED)
        kept = (numbers >= 0) | (instances.scores >= threshold)
        order = instances.scores.argsort(descending=True, stable=True)
        yield dataclasses.replace(prediction, instances=instances[order[kept[order]]])
