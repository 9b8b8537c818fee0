"""Videos: what is read, what is written, and what can be wrong with them."""

import re

import cv2
import numpy as np
import pytest

from lite_detr.errors import MissingPackageError, SaveError, VideoError
from lite_detr.inference import video
from lite_detr.inference.video import Frame, VideoReader, VideoWriter


def make_frames(count=10, size=(48, 64), rate=25.0):
    """Frames whose left half gets lighter."""
    frames = []
    for number in range(count):
        image = np.zeros((*size, 3), np.uint8)
        image[:, : size[1] // 2] = 20 + 20 * (number % 10)
        frames.append(Frame(number, number / rate, image))
    return frames


def write(path, frames, rate=25.0):
    with VideoWriter(path, rate) as writer:
        for frame in frames:
            writer.write(frame)
    return writer


def read(path):
    with VideoReader(path) as reader:
        return reader, list(reader)


@pytest.mark.parametrize("size", [(48, 64), (47, 63), (2, 3)])
@pytest.mark.parametrize("rate", [25.0, 29.97, 119.88])
def test_frames_that_are_written_are_read_again(tmp_path, size, rate):
    frames = make_frames(size=size, rate=rate)
    write(tmp_path / "a.mp4", frames, rate)
    reader, found = read(tmp_path / "a.mp4")
    assert reader.rate == pytest.approx(rate, rel=0.002) and reader.problem is None
    assert reader.num_frames == len(found) == 10
    for frame, expected in zip(found, frames):
        assert frame.number == expected.number
        assert frame.time == pytest.approx(expected.time, abs=0.002)
        # One more row or column where a side is odd.
        assert [side - side % 2 for side in frame.image.shape[:2]] == list(frame.image.shape[:2])
        height, width = size
        assert 0 <= frame.image.shape[0] - height <= 1 and 0 <= frame.image.shape[1] - width <= 1
        left, right = frame.image[:, : width // 4 + 1], frame.image[:, -(width // 4) - 1 :]
        if width > 3:
            assert abs(left.mean() - expected.image[0, 0, 0]) < 6 and right.mean() < 6


def test_a_frame_is_shown_until_the_next_one(tmp_path):
    first, second, third = make_frames(3)
    late = [first, second._replace(time=0.4), third._replace(time=0.41)]
    write(tmp_path / "a.mp4", late)
    levels = [frame.image[0, 0, 0] for frame in read(tmp_path / "a.mp4")[1]]
    assert len(levels) == 12
    assert np.abs(np.diff(levels[:10])).max() < 3 and levels[10] > levels[9] + 10


def test_a_frame_of_another_size_is_resized(tmp_path):
    frames = make_frames(4)
    frames[2] = frames[2]._replace(image=np.full((24, 30, 3), 200, np.uint8))
    write(tmp_path / "a.mp4", frames)
    found = read(tmp_path / "a.mp4")[1]
    assert [frame.image.shape for frame in found] == [(48, 64, 3)] * 4
    assert abs(found[2].image.mean() - 200) < 6


def test_an_interrupted_video_can_be_played(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4", 25.0) as writer:
        for frame in make_frames(7):
            writer.write(frame)
        raise KeyboardInterrupt
    assert len(read(tmp_path / "a.mp4")[1]) == 7


def test_a_missing_encoder_is_replaced(tmp_path, monkeypatch):
    encoders = [("none", ".mp4"), *video.ENCODERS[-1:]]
    monkeypatch.setattr(video, "ENCODERS", encoders)
    writer = write(tmp_path / "a.mp4", make_frames())
    assert writer.path == tmp_path / "a.mp4.avi" and not (tmp_path / "a.mp4").exists()
    assert len(read(writer.path)[1]) == 10
    monkeypatch.setattr(video, "ENCODERS", encoders[:1])
    with pytest.raises(SaveError, match="no encoder for videos of 64 x 48 pixels"):
        write(tmp_path / "a.mp4", make_frames())


def test_files_that_are_no_videos(tmp_path, capfd):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("text " * 1000)
    write(tmp_path / "whole.mp4", make_frames(50))
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    for name in ("empty.mp4", "text.mp4", "cut.mp4", "absent.mp4"):
        with pytest.raises(VideoError, match="unreadable video"):
            VideoReader(tmp_path / name)
    # Nothing of FFmpeg or OpenCV.
    assert capfd.readouterr() == ("", "")


def test_a_video_that_is_cut_off_says_where(tmp_path):
    code = cv2.VideoWriter_fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(tmp_path / "whole.avi"), code, 25.0, (64, 48))
    for frame in make_frames(50):
        writer.write(frame.image)
    writer.release()
    assert read(tmp_path / "whole.avi")[0].problem is None
    whole = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    reader, frames = read(tmp_path / "cut.avi")
    assert 10 < len(frames) < 40
    assert re.search(rf"of 2.0 seconds.* its first {len(frames)} frames were", reader.problem)


class Capture:
    """Stands in for OpenCV's, with frames at times of the test's choice."""

    def __init__(self, times, rate=25.0):
        self.times, self.rate, self.position = times, rate, -1

    def isOpened(self):
        return True

    def get(self, what):
        if what == cv2.CAP_PROP_POS_MSEC:
            return 1000 * self.times[self.position]
        return {cv2.CAP_PROP_FPS: self.rate}.get(what, -1.0)

    def set(self, what, value):
        return True

    def read(self):
        self.position += 1
        is_there = self.position < len(self.times)
        return is_there, np.zeros((8, 8, 3), np.uint8) if is_there else None

    def release(self):
        pass


@pytest.mark.parametrize(
    "rate, given, expected",
    [
        (25.0, [0.0, 0.1, 0.5], [0.0, 0.1, 0.5]),
        (25.0, [0.0, 0.0, 0.0], [0.0, 0.04, 0.08]),
        (25.0, [0.0, 0.1, -5.0, 0.2], [0.0, 0.1, 0.14, 0.2]),
        # The ticks of the clock of a file whose frames come at different intervals.
        (90000.0, [0.0, 0.03, 0.08], [0.0, 0.03, 0.08]),
    ],
)
def test_times_never_go_back(monkeypatch, tmp_path, rate, given, expected):
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: Capture(given, rate))
    reader, frames = read(tmp_path / "a.mp4")
    assert [frame.time for frame in frames] == pytest.approx(expected)
    assert reader.rate == 25.0 and reader.num_frames is None and reader.problem is None


def test_a_video_without_frames_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: Capture([]))
    assert read(tmp_path / "a.mp4")[0].problem == "it has no frame that can be read"


def test_a_camera_that_is_not_there():
    with pytest.raises(VideoError, match="webcam 99 cannot be opened"):
        VideoReader(99)


def test_a_window_needs_a_display_and_an_opencv_with_windows(monkeypatch):
    monkeypatch.setattr(video.sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(VideoError, match="as there is no display: give --output FILE.mp4"):
        video.open_window("webcam 0", is_optional=False)
    with video.open_window("webcam 0", is_optional=True) as window:
        assert window is None
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "GUI:              NONE")
    with pytest.raises(VideoError, match="installed without windows"):
        video.open_window("webcam 0", is_optional=False)


def test_videos_need_opencv(monkeypatch):
    monkeypatch.setitem(video.sys.modules, "cv2", None)
    with pytest.raises(MissingPackageError, match="run `pip install opencv-python-headless`"):
        video.load_opencv()
