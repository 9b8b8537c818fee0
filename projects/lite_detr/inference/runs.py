"""Runs of a detector over images and videos: what they draw, write and count."""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from detectron2.data.detection_utils import convert_image_to_rgb
from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from ..cores import count_cores
from ..errors import ImageError, SaveError, VideoError
from ..labels import first_line, printable
from .detection_file import DetectionFile
from .pictures import contact_sheet, draw_detections, load_visualizer
from .predictor import FramePrediction, TrainedDetector
from .tracking import track
from .video import VideoReader, VideoWriter, Window

if TYPE_CHECKING:
    from .slices import SlicedDetector

# Of the images without detections, the number that is named.
MAX_NAMED = 5
# Of pictures in formats that lose some.
QUALITY = 95


@dataclass
class Counts:
    """The numbers of files, frames and detections of a run, and the files without detections.

    Attributes:
        images, videos, frames: the number of those that could be used.
        detections: the number of those that reach the threshold.
        failures: the number of files that could not be used, or not to their end.
        empty: the files without a detection, each with its best score; None if it has none.
    """

    images: int = 0
    videos: int = 0
    frames: int = 0
    detections: int = 0
    failures: int = 0
    empty: dict[str, float | None] = field(default_factory=dict)

    def summary(self) -> str:
        parts = [f"images: {self.images}"] if self.images or not self.videos else []
        if self.videos:
            parts += [f"videos: {self.videos}", f"frames: {self.frames}"]
        return ", ".join([*parts, f"detections: {self.detections}", f"failures: {self.failures}"])

    def hint(self, threshold: float) -> str:
        """Return what to do about files without detections; empty if there are none."""
        if not self.empty:
            return ""
        few = f"{len(self.empty)} of {self.images + self.videos} files"
        scores = {name: score for name, score in self.empty.items() if score is not None}
        if not scores:
            return f"{few} without any detection, whatever its score"
        names = sorted(scores, key=scores.__getitem__, reverse=True)
        named = [f"{printable(name)} {round_down(scores[name])}" for name in names[:MAX_NAMED]]
        more = ", ..." if len(names) > MAX_NAMED else ""
        return (
            f"{few} without a detection that scores {threshold:g} or more; their best scores: "
            f"{', '.join(named)}{more}. Lower --confidence-threshold, such as to "
            f"{round_down(scores[names[0]])}, to see more"
        )


def round_down(score: float) -> str:
    """Return a score with two digits, and never a larger one."""
    if score <= 0:
        return "0"
    digits = max(2, 1 - math.floor(math.log10(score)))
    # A number like 0.29 may be slightly less than 29 hundredths.
    return f"{math.floor(score * 10**digits + 1e-9) / 10**digits:.{digits}f}"


class Run:
    """A run of a detector; its results are written as they are found.

    Also a context, which closes what it writes.

    Args:
        detector: predicts, and drops what is below its threshold.
        json: the file of detections; None writes none.
        batch_size: the largest number of images, frames or slices to predict at once.
        track_threshold: the objects of videos are numbered, see :func:`track`; None does not.

    Attributes:
        counts: of all that it has seen so far.
    """

    def __init__(
        self,
        detector: "TrainedDetector | SlicedDetector",
        json: Path | None = None,
        batch_size: int = 1,
        track_threshold: float | None = None,
    ):
        self.detector = detector
        self.track_threshold = track_threshold
        self.class_names = detector.metadata.thing_classes if detector.metadata else None
        self.batch_size = batch_size
        self.counts = Counts()
        self.stack = ExitStack()
        self.detection_file = None
        if json:
            self.detection_file = self.stack.enter_context(DetectionFile(json, self.class_names))

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.__exit__(*error)

    def predict_images(
        self,
        images: Sequence[Path],
        pictures: Iterator[Path] | None,
        num_workers: int = 0,
        sheet: Path | None = None,
    ) -> None:
        """Predict image files; the unusable ones are named on stderr.

        Args:
            images: the files.
            pictures: where each image's picture goes; None draws none.
            num_workers: see :class:`BatchPredictor`.
            sheet: the file that shows the first pictures; None makes none.

        Raises:
            SaveError: a picture cannot be written.
            MissingPackageError: a package that draws is not installed.
        """
        if pictures:
            load_visualizer()
        drawn = []
        predictions = self.detector.predict_files(images, self.batch_size, num_workers)
        for prediction in tqdm(predictions, total=len(images), unit="image"):
            path, instances, problem = prediction.path, prediction.instances, prediction.problem
            picture = next(pictures) if pictures else None
            if instances is not None and picture:
                try:
                    pixels = self.detector.read_rgb(path)
                except ImageError as error:  # gone since it was predicted
                    problem = str(error)
                else:
                    pixels = draw_detections(pixels, instances, self.class_names)
                    save_picture(pixels, picture)
                    drawn.append(picture)
            if problem is not None:
                self.fail(path, f"skipped: {problem}")
                continue
            self.counts.images += 1
            self.counts.detections += len(instances)
            if not len(instances):
                self.counts.empty[str(path)] = prediction.best_score
            if self.detection_file:
                self.detection_file.add(path, instances)
        if sheet and drawn:
            contact_sheet(drawn).save(sheet)

    def predict_videos(self, videos: Sequence[Path], outputs: Iterator[Path] | None) -> None:
        """Predict video files; the unusable ones are named on stderr.

        Args:
            videos: the files.
            outputs: where each video's boxes are shown; None draws none.

        Raises:
            SaveError: a video cannot be written.
            MissingPackageError: a package that draws is not installed.
        """
        for path in videos:
            output = next(outputs) if outputs else None
            try:
                with VideoReader(path) as video:
                    self.predict_video(video, output)
            except (VideoError, ImageError) as error:
                self.fail(path, f"skipped: {error}")

    def predict_video(
        self, video: VideoReader, output: Path | None, window: Window | None = None
    ) -> None:
        """Predict an opened video to its end, or a camera until its window is closed or Ctrl-C.

        Args:
            video: the file or camera.
            output: the video file that shows its boxes; None writes none.
            window: shows the same; None shows none.

        Raises:
            ImageError: its frames are too thin to resize.
            SaveError: the output cannot be written.
            MissingPackageError: a package that draws is not installed.
        """
        if output or window:
            load_visualizer()
        # Frames of a camera do not wait for others.
        batch_size = 1 if video.is_camera else self.batch_size
        predictions = self.detector.predict_frames(video, batch_size)
        if self.track_threshold is not None:
            predictions = track(predictions, video.rate, self.track_threshold)
        name = printable(Path(video.name).name)
        bar = tqdm(predictions, desc=name, total=video.num_frames, unit="frame")
        scores: list[float] = []
        before = self.counts.frames, self.counts.detections
        with VideoWriter(output, video.rate) if output else nullcontext() as writer:
            try:
                for prediction in bar:
                    self.counts.frames += 1
                    self.counts.detections += len(prediction.instances)
                    if prediction.best_score is not None:
                        scores.append(prediction.best_score)
                    if not self.record_frame(video.name, prediction, writer, window):
                        break
            except KeyboardInterrupt:
                if not video.is_camera:
                    raise
        if writer and writer.num_frames and writer.path != output:
            note = f"written to {printable(writer.path)}: this OpenCV has no encoder for MP4"
            tqdm.write(f"{name}: {note}", file=sys.stderr)
        if self.counts.frames > before[0]:
            self.counts.videos += 1
            if self.counts.detections == before[1]:
                self.counts.empty[video.name] = max(scores, default=None)
        if video.problem:
            self.fail(video.name, video.problem)

    def record_frame(
        self,
        name: str,
        prediction: FramePrediction,
        writer: VideoWriter | None,
        window: Window | None,
    ) -> bool:
        """Write and show a frame; return False if the window has been closed."""
        frame, instances = prediction.frame, prediction.instances
        if self.detection_file:
            where = {"frame": frame.number, "time": round(frame.time, 3)}
            self.detection_file.add(name, instances, **where)
        if writer or window:
            rgb = convert_image_to_rgb(frame.image, "BGR")
            drawn = draw_detections(rgb, instances, self.class_names)
            frame = frame._replace(image=np.ascontiguousarray(drawn[:, :, ::-1]))
        if writer:
            writer.write(frame)
        return not window or window.show(frame.image)

    def fail(self, name: object, problem: str) -> None:
        """Report a file that cannot be used, or not to its end."""
        self.counts.failures += 1
        tqdm.write(f"{printable(name)}: {problem}", file=sys.stderr)
        if self.detection_file:
            self.detection_file.add_problem(name, problem.removeprefix("skipped: "))


def save_picture(pixels: np.ndarray, path: Path) -> None:
    """Save an RGB picture in the format of its file's suffix.

    Raises:
        SaveError: it cannot be written, or is too large for the format.
    """
    try:
        Image.fromarray(pixels).save(path, quality=QUALITY)
    except (OSError, ValueError) as error:
        raise SaveError(f"{printable(path)} cannot be written: {first_line(error)}") from error


def default_workers(cfg: DictConfig) -> int:
    """Return the number of the test loader's workers, limited to the number of cores."""
    return min(cfg.dataloader.test.get("num_workers", 0), count_cores())
