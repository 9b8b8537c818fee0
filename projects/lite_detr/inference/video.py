"""Videos and cameras: their frames, the videos that are written, and a window that shows them."""

import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NamedTuple

import numpy as np

from ..errors import MissingPackageError, SaveError, VideoError
from ..labels import printable

# Of the encoders that OpenCV may have, the one whose files most players show comes first. Those of
# the package index have the second; the third is part of OpenCV itself.
ENCODERS = (("avc1", ".mp4"), ("mp4v", ".mp4"), ("MJPG", ".avi"))
# Frames per second where a file does not say, or gives the ticks of its clock instead.
USUAL_RATE, MAX_RATE = 25.0, 240.0
# The part of a video's length at its end that may be missing before it counts as damaged.
MISSING_PART = 0.05
ESCAPE = 27


class Frame(NamedTuple):
    """One frame of a video.

    Attributes:
        number: from 0.
        time: in seconds from the beginning.
        image: BGR, ``[H, W, 3]``.
    """

    number: int
    time: float
    image: np.ndarray


def load_opencv() -> ModuleType:
    """Import OpenCV, and let it say nothing about files that it cannot read or write.

    Raises:
        MissingPackageError: it is not installed.
    """
    # Read once, when a file is opened for the first time.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ModuleNotFoundError:
        raise MissingPackageError(
            "videos need OpenCV: run `pip install opencv-python-headless`"
        ) from None
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


class VideoReader:
    """The frames of a video file or a camera, upright, in order.

    Args:
        source: a file, or a camera's number.

    Attributes:
        name: of the source, for messages and files.
        rate: frames per second.
        num_frames: as the file says, often roughly; None if it does not, as for cameras.
        problem: why there are fewer frames than the file says; None until that is known.

    Raises:
        VideoError: it cannot be opened.
        MissingPackageError: OpenCV is not installed.
    """

    def __init__(self, source: Path | int):
        self.cv2 = load_opencv()
        self.problem: str | None = None
        self.is_camera = isinstance(source, int)
        self.name = f"webcam {source}" if self.is_camera else str(source)
        self.capture = self.cv2.VideoCapture(source if self.is_camera else str(source))
        if not self.capture.isOpened():
            raise VideoError(
                f"{self.name} cannot be opened: there is none, or another program uses it"
                if self.is_camera
                else "unreadable video: OpenCV does not know it, or it is damaged"
            )
        # Frames that wait in a camera's buffer are old when the detector gets to them.
        if self.is_camera:
            self.capture.set(self.cv2.CAP_PROP_BUFFERSIZE, 1)
        rate = self.capture.get(self.cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate <= MAX_RATE else USUAL_RATE
        # Without an end, the length is a large negative number.
        count = self.capture.get(self.cv2.CAP_PROP_FRAME_COUNT)
        self.num_frames = int(count) if not self.is_camera and count > 0 else None
        self.length = self.num_frames / rate if self.num_frames and rate > 0 else None

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.capture.release()

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames; afterwards ``problem`` says whether they were all."""
        number, now, start = 0, 0.0, 0.0
        while True:
            read, image = self.capture.read()
            if not read:
                break
            start = start or time.monotonic()
            given = time.monotonic() - start if self.is_camera else self.file_time()
            # Some files have no times, or broken ones.
            if number:
                now = given if given > now else now + 1 / self.rate
            yield Frame(number, now, image)
            number += 1
        if not number:
            self.problem = "it has no frame that can be read"
        elif self.length and number < (1 - MISSING_PART) * self.num_frames:
            end = now + 1 / self.rate
            if end < (1 - MISSING_PART) * self.length:
                self.problem = (
                    f"it ends after {end:.1f} of {self.length:.1f} seconds, damaged or cut off: "
                    f"its first {number} frames were used"
                )

    def file_time(self) -> float:
        """Return when the frame that was read last is shown, in seconds."""
        seconds = self.capture.get(self.cv2.CAP_PROP_POS_MSEC) / 1000
        return min(seconds, self.length) if self.length else seconds


class VideoWriter:
    """A video file with a constant rate of frames, which can be played even after an interrupt.

    A frame is repeated until the time of the next one, so that the video of a camera, or of a file
    whose frames come at different intervals, is as long as what it shows.

    Args:
        path: of the file, which is replaced. Where OpenCV has no encoder for MP4, ``.avi`` is
            added to its name.
        rate: frames per second.

    Attributes:
        path: of the file that is written.
    """

    def __init__(self, path: Path, rate: float):
        self.cv2 = load_opencv()
        self.path = path
        # MPEG-4 counts time in up to 65535 parts of a second.
        self.rate = round(rate, 3) if rate <= 60 else float(round(rate))
        self.writer = None
        self.size = (0, 0)
        self.num_frames = 0
        self.last: np.ndarray | None = None

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.writer is not None:
            self.writer.release()
            if error is None and not self.cv2.VideoCapture(str(self.path)).isOpened():
                raise SaveError(f"{printable(self.path)} could not be written: is the disk full?")

    def write(self, frame: Frame) -> None:
        """Append a frame; the size of the first is that of the video.

        Raises:
            SaveError: the file cannot be written.
        """
        image = frame.image
        if self.writer is None:
            # Encoders store colour for two by two pixels; OpenCV would cut the last one off.
            self.size = tuple(math.ceil(side / 2) * 2 for side in image.shape[1::-1])
            self.open()
        image = self.fit(image)
        for _ in range(self.num_frames, round(frame.time * self.rate)):
            self.append(image if self.last is None else self.last)
        self.append(image)

    def append(self, image: np.ndarray) -> None:
        self.writer.write(image)
        self.last = image
        self.num_frames += 1

    def fit(self, image: np.ndarray) -> np.ndarray:
        """Return a frame in the video's size: with its last pixels repeated, or resized."""
        width, height = self.size
        right, below = width - image.shape[1], height - image.shape[0]
        if 0 <= right <= 1 and 0 <= below <= 1:
            border = self.cv2.BORDER_REPLICATE
            return self.cv2.copyMakeBorder(image, 0, below, 0, right, border)
        return self.cv2.resize(image, self.size)

    def open(self) -> None:
        for code, suffix in ENCODERS:
            path = self.path
            if path.suffix.lower() != suffix:
                path = path.with_name(path.name + suffix)
            fourcc = self.cv2.VideoWriter_fourcc(*code)
            writer = self.cv2.VideoWriter(str(path), fourcc, self.rate, self.size)
            if writer.isOpened():
                self.path, self.writer = path, writer
                return
        raise SaveError(
            f"{printable(self.path)} cannot be written: this OpenCV has no encoder for videos of "
            f"{self.size[0]} x {self.size[1]} pixels"
        )


class Window:
    """A window that shows frames until it is closed, or Q or Escape is pressed.

    Args:
        title: of the window.
    """

    def __init__(self, title: str):
        self.cv2 = load_opencv()
        self.title = title
        self.cv2.namedWindow(title, self.cv2.WINDOW_NORMAL)

    def __enter__(self) -> "Window":
        return self

    def __exit__(self, *error: object) -> None:
        self.cv2.destroyWindow(self.title)

    def show(self, image: np.ndarray) -> bool:
        """Show a BGR image; return False if the user is done."""
        self.cv2.imshow(self.title, image)
        key = self.cv2.waitKey(1) & 0xFF
        is_open = self.cv2.getWindowProperty(self.title, self.cv2.WND_PROP_VISIBLE) > 0
        return is_open and key not in (ESCAPE, ord("q"))


def open_window(title: str, is_optional: bool) -> Window | nullcontext[None]:
    """Return a window as a context; of None where none can be shown and it is optional.

    Raises:
        VideoError: none can be shown, and it is not optional.
    """
    if not (reason := no_window_reason()):
        return Window(title)
    if is_optional:
        return nullcontext()
    raise VideoError(
        f"no window can show {printable(title)}, as {reason}: give --output FILE.mp4 or --json "
        "FILE.json, and end the recording with Ctrl-C"
    )


def no_window_reason() -> str:
    """Return why no window can be shown here; empty if one can."""
    # Qt, which draws OpenCV's windows, ends the whole process if it finds no display.
    has_display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not has_display:
        return "there is no display"
    if re.search(r"GUI:\s+NONE", load_opencv().getBuildInformation()):
        return "OpenCV is installed without windows, as opencv-python-headless is"
    return ""
