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

    An object has the same number, from 1 on, in all frames but its first, where nothing tells it
    from a false detection yet: there it is ``UNTRACKED``. It may be missed for a second, and its
    class may change. Other trackers of the ``trackers`` package take
    ``supervision.Detections.from_detectron2({"instances": instances})`` as this one does.

    Args:
        predictions: of the frames, in order.
        rate: frames per second.
        threshold: of the detector; each detection that reaches it begins a track.

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
        tracked = tracker.update(detections)
        ids = torch.full((len(instances),), UNTRACKED)
        if len(tracked):
            numbers = torch.from_numpy(tracked.tracker_id)
            ids[tracked.data["position"]] = torch.where(numbers >= 0, numbers + 1, UNTRACKED)
        instances.track_ids = ids
        yield dataclasses.replace(prediction, instances=instances)
