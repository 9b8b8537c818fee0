"""Large pictures with small objects: detectors that look at overlapping slices, by SAHI."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from ..errors import ImageError, MissingPackageError
from .predictor import (
    FilePrediction,
    FramePrediction,
    TrainedDetector,
    best_score,
)
from .video import Frame

try:
    from sahi.models.base import DetectionModel
    from sahi.predict import get_sliced_prediction
    from sahi.prediction import ObjectPrediction
except ModuleNotFoundError as error:
    raise MissingPackageError(
        f"slices need SAHI ({error.name} is missing): run `pip install sahi`"
    ) from None


class SahiModel(DetectionModel):
    """A trained detector as a ``DetectionModel`` of SAHI, for its functions and programs.

    Args:
        detector: predicts the slices, and drops what is below its threshold.

    Attributes:
        best_score: the highest so far, also of detections that the threshold has dropped.
    """

    def __init__(self, detector: TrainedDetector):
        self.best_score: float | None = None
        super().__init__(
            model=detector,
            device=str(next(detector.model.parameters()).device),
            confidence_threshold=detector.threshold,
        )

    def set_model(self, model: TrainedDetector, **kwargs: object) -> None:
        self.model = model
        names = model.metadata.thing_classes if model.metadata else None
        self.category_mapping = names and {str(i): name for i, name in enumerate(names)}

    def perform_inference(self, image: np.ndarray) -> None:
        """Predict an RGB image ``[H, W, 3]``."""
        self.perform_batch_inference([image])

    def perform_batch_inference(self, images: list[np.ndarray]) -> None:
        """Predict RGB images; those of one size share a batch."""
        self._original_predictions = self.model.predict_images(images)

    def _create_object_prediction_list_from_original_predictions(
        self,
        shift_amount_list: list[list[int]] | None = None,
        full_shape_list: list[list[int]] | None = None,
    ) -> None:
        # One image comes without a list around it.
        shifts, shapes = np.reshape(shift_amount_list, (-1, 2)), [None]
        if full_shape_list is not None:
            shapes = np.reshape(full_shape_list, (-1, 2)).tolist()
        self._object_prediction_list_per_image = []
        for instances, shift, shape in zip(self._original_predictions, shifts.tolist(), shapes):
            scores = [self.best_score, best_score(instances)]
            self.best_score = max((score for score in scores if score is not None), default=None)
            kept = instances[instances.scores >= self.confidence_threshold]
            self._object_prediction_list_per_image.append(
                [
                    ObjectPrediction(
                        bbox=box,
                        category_id=number,
                        category_name=(self.category_mapping or {}).get(str(number), str(number)),
                        score=score,
                        shift_amount=shift,
                        full_shape=shape,
                    )
                    for box, number, score in zip(
                        kept.pred_boxes.tensor.tolist(),
                        kept.pred_classes.tolist(),
                        kept.scores.tolist(),
                    )
                    # SAHI refuses boxes without an area.
                    if box[2] > box[0] and box[3] > box[1]
                ]
            )


class SlicedDetector:
    """A trained detector that predicts each image slice by slice, and once as a whole.

    Objects that are larger than the overlap of the slices may be cut by each of them; those that
    are larger than a slice are only found in the whole image.

    Args:
        detector: predicts the slices.
        side: of a slice, in pixels of the image. The detector resizes it as it resizes images.
        overlap: of neighbouring slices, in parts of the side.
        **options: of SAHI's ``get_sliced_prediction``, such as ``postprocess_type``.
    """

    def __init__(
        self, detector: TrainedDetector, side: int, overlap: float = 0.25, **options: object
    ):
        self.detector = detector
        self.metadata = detector.metadata
        self.read_rgb = detector.read_rgb
        self.options = {
            "slice_height": side,
            "slice_width": side,
            "overlap_height_ratio": overlap,
            "overlap_width_ratio": overlap,
            # SAHI's default merges boxes, and so makes one of two objects that overlap.
            "postprocess_type": "NMS",
            "verbose": 0,
        } | options

    def predict_image(
        self, image: np.ndarray, batch_size: int = 1
    ) -> tuple[Instances, float | None]:
        """Return the detections of an RGB image ``[H, W, 3]``, best first, and the best score.

        The score is that of all detections, also of those that the threshold has dropped.
        """
        model = SahiModel(self.detector)
        result = get_sliced_prediction(image, model, batch_size=batch_size, **self.options)
        found = sorted(result.object_prediction_list, key=lambda each: -each.score.value)
        instances = Instances(image.shape[:2])
        boxes = torch.tensor([each.bbox.to_xyxy() for each in found], dtype=torch.float32)
        instances.pred_boxes = Boxes(boxes.reshape(-1, 4))
        instances.pred_boxes.clip(instances.image_size)
        instances.scores = torch.tensor([each.score.value for each in found])
        instances.pred_classes = torch.tensor(
            [each.category.id for each in found], dtype=torch.int64
        )
        return instances, model.best_score

    def predict_files(
        self, paths: Iterable[str | Path], batch_size: int = 1, num_workers: int = 0
    ) -> Iterator[FilePrediction]:
        """Yield the prediction of each file, in order; ``batch_size`` is that of the slices."""
        for path in map(Path, paths):
            try:
                image = self.read_rgb(path)
            except ImageError as error:
                yield FilePrediction(path, problem=str(error))
            else:
                instances, best = self.predict_image(image, batch_size)
                yield FilePrediction(path, instances, best_score=best)

    def predict_frames(
        self, frames: Iterable[Frame], batch_size: int = 1
    ) -> Iterator[FramePrediction]:
        """Yield the prediction of each frame of a video, in order."""
        for frame in frames:
            image = np.ascontiguousarray(frame.image[:, :, ::-1])
            yield FramePrediction(frame, *self.predict_image(image, batch_size))
