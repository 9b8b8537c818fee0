"""The demo on a tiny detector with random weights: images, videos and where results go."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import demo
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from PIL import Image
from programs import ROOT

from lite_detr import model_zoo
from lite_detr.checkpoint import DetrCheckpointer
from lite_detr.data.coco import class_metadata
from lite_detr.inference import predictor, runs, video
from lite_detr.inference.pictures import contact_sheet
from lite_detr.inference.predictor import TrainedDetector
from lite_detr.inference.video import Frame, VideoReader, VideoWriter

CONFIG = """
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock

from lite_detr import model_zoo

model = model_zoo.get_config("common/models/deformable_detr.py").model
train = model_zoo.get_config("common/train.py").train
data = model_zoo.get_config("common/data/custom.py").data
dataloader = model_zoo.get_config("common/data/digits.py").dataloader

model.backbone = L(ResNet)(
    stem=L(BasicStem)(out_channels=8),
    stages=[
        L(ResNet.make_stage)(
            block_class=BasicBlock,
            num_blocks=1,
            stride_per_block=[2],
            in_channels=channels,
            out_channels=2 * channels,
        )
        for channels in (8, 16, 32)
    ],
    out_features=["res2", "res3", "res4"],
)
model.embed_dim = 32
model.num_classes = 10
model.encoder.num_layers = 1
model.encoder.layer.ffn.hidden_dim = 32
model.queries.num_queries = 10
model.decoder.heads.num_layers = 1
model.detections_per_image = 8
dataloader.test.mapper.augmentations[0].short_edge_length = 96
train.device = "cpu"
train.init_checkpoint = ""
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with tiny.py and weights.pth."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.py").write_text(CONFIG)
    torch.manual_seed(0)
    model = instantiate(model_zoo.get_config(str(folder / "tiny.py")).model)
    DetrCheckpointer(model, str(folder)).save("weights")
    return folder


@pytest.fixture
def images(tmp_path):
    """A folder with a.jpg, b.png and c.jpg, which differ in size, and a file of another kind."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, (width, height) in {"c.jpg": (90, 60), "a.jpg": (60, 90), "b.png": (70, 70)}.items():
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def arguments(trained, tmp_path):
    """Makes a command line that draws all detections, unless ``output`` is no folder."""

    def make(
        *inputs,
        config=trained / "tiny.py",
        weights=trained / "weights.pth",
        output=tmp_path / "out",
        more=(),
    ):
        options = {"--config-file": config, "--weights": weights, "--confidence-threshold": 0}
        options |= {"--output": output} if output else {}
        given = [str(text) for pair in options.items() for text in pair]
        return [*given, "--input", *map(str, inputs), *map(str, more)]

    return make


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_folder_gives_a_picture_for_each_image(arguments, images, tmp_path, capsys):
    assert demo.main(arguments(images)) == 0
    assert names(tmp_path / "out") == ["a.png", "b.png", "c.png"]
    with Image.open(tmp_path / "out/c.png") as picture, Image.open(images / "c.jpg") as image:
        assert picture.size == image.size
        assert (np.asarray(picture.convert("RGB")) != np.asarray(image)).any()
    output = capsys.readouterr()
    assert output.out == (
        f"images: 3, detections: 24, failures: 0; pictures are in {tmp_path / 'out'}\n"
    )
    assert "3/3" in output.err


def test_no_picture_overwrites_another_or_an_image(arguments, images):
    other = images.parent / "other"
    other.mkdir()
    for name in ("a.jpg", "b.png"):
        shutil.copy(images / name, other)
    before = (images / "b.png").read_bytes()
    command = arguments(images, other, more=["--output", images])
    assert demo.main(command) == 0
    assert (images / "b.png").read_bytes() == before
    pictures = {"a.png", "a_2.png", "b_2.png", "b_3.png", "c.png"}
    assert set(names(images)) == pictures | {"a.jpg", "b.png", "c.jpg", "notes.txt"}


def test_unreadable_image_is_named_and_skipped(arguments, images, tmp_path, capsys):
    broken = images / "b.png"
    broken.write_bytes(broken.read_bytes()[:1000])
    absent = images / "absent.jpg"
    assert demo.main(arguments(images, images / "notes.txt", absent)) == 1
    assert names(tmp_path / "out") == ["a.png", "c.png"]
    output = capsys.readouterr()
    for path in (broken, images / "notes.txt", absent):
        assert f"{path}: " in output.err
    assert "images: 2, detections: 16, failures: 3;" in output.out


@pytest.mark.parametrize("given", ["empty", "*.jpg", "absent.jpg"])
def test_no_image_found(arguments, tmp_path, capsys, given):
    (tmp_path / "empty").mkdir()
    assert demo.main(arguments(tmp_path / given)) == 1
    assert f"{tmp_path / given}: skipped, as it is not a file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_exif_orientation(arguments, images, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    with Image.open(images / "a.jpg") as image:
        image.save(images / "turned.jpg", exif=exif)
    assert demo.main(arguments(images / "turned.jpg")) == 0
    with Image.open(tmp_path / "out/turned.png") as picture:
        assert picture.size == image.size[::-1]


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_reads_as_the_test_mapper_does(trained, images, image_format):
    cfg = model_zoo.get_config(str(trained / "tiny.py"))
    cfg.train.init_checkpoint = str(trained / "weights.pth")
    cfg.dataloader.test.mapper.image_format = image_format
    path = images / "c.jpg"
    pixels, inputs = TrainedDetector(cfg, threshold=0.0).read(path)
    expected = instantiate(cfg.dataloader.test.mapper)({"file_name": str(path)})
    assert torch.equal(inputs.pop("image"), expected["image"])
    assert inputs == {"height": 60, "width": 90}
    with Image.open(path) as image:
        assert (pixels == np.asarray(image)).all()


def test_draws_what_reaches_the_threshold(arguments, trained, images, monkeypatch, capsys):
    cfg = model_zoo.get_config(str(trained / "tiny.py"))
    cfg.train.init_checkpoint = str(trained / "weights.pth")
    everything = TrainedDetector(cfg, threshold=0.0)
    scores = everything.predict(everything.read(images / "a.jpg")[1]).scores
    assert len(scores) == 8 and scores[2] > scores[3]

    drawn = []
    draw = runs.draw_detections

    def record(image, instances, names):
        drawn.extend(instances.scores.tolist())
        return draw(image, instances, names)

    monkeypatch.setattr(runs, "draw_detections", record)
    more = ["--confidence-threshold", scores[2].item()]
    assert demo.main(arguments(images / "a.jpg", more=more)) == 0
    assert drawn == scores[:3].tolist()
    assert "detections: 3," in capsys.readouterr().out


def test_image_without_detections_is_saved(arguments, images, tmp_path):
    more = ["--confidence-threshold", "1"]
    assert demo.main(arguments(images / "b.png", more=more)) == 0
    with Image.open(tmp_path / "out/b.png") as picture, Image.open(images / "b.png") as image:
        assert (np.asarray(picture.convert("RGB")) == np.asarray(image)).all()


@pytest.mark.parametrize("more", [[], ["--batch-size", "2", "--workers", "2"]], ids=" ".join)
def test_json_has_a_line_for_each_image(arguments, trained, images, tmp_path, capsys, more):
    (images / "b.png").write_text("broken")
    path = tmp_path / "found/detections.json"
    command = arguments(images, output=None, more=["--json", path, *more])
    assert demo.main(command) == 1
    assert not (tmp_path / "out").exists()
    output = capsys.readouterr()
    counts = "images: 2, detections: 16, failures: 1"
    assert output.out == f"{counts}; detections are in {path}\n"
    assert f"{images / 'b.png'}: skipped: unreadable image" in output.err

    assert len(path.read_text().splitlines()) == 3 + 2
    entries = json.loads(path.read_text())
    assert [entry["file_name"] for entry in entries] == [
        str(images / name) for name in ("a.jpg", "b.png", "c.jpg")
    ]
    assert entries[1].keys() == {"file_name", "problem"}
    assert entries[1]["problem"].startswith("unreadable image")
    cfg = model_zoo.get_config(str(trained / "tiny.py"))
    cfg.train.init_checkpoint = str(trained / "weights.pth")
    single = TrainedDetector(cfg, threshold=0.0)
    for entry, size in ((entries[0], (90, 60)), (entries[2], (60, 90))):
        assert (entry["height"], entry["width"]) == size
        expected = single.predict(single.read(Path(entry["file_name"]))[1])
        found = entry["detections"]
        assert [d["class"] for d in found] == [str(c) for c in expected.pred_classes.tolist()]
        scores = torch.tensor([detection["score"] for detection in found])
        boxes = torch.tensor([detection["box"] for detection in found])
        torch.testing.assert_close(scores, expected.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(boxes, expected.pred_boxes.tensor, rtol=0, atol=0.01)


def test_json_beside_pictures_and_only_confident_detections(arguments, images, tmp_path, capsys):
    path = tmp_path / "found.json"
    command = arguments(images / "a.jpg", more=["--json", path, "--confidence-threshold", "1"])
    assert demo.main(command) == 0
    assert names(tmp_path / "out") == ["a.png"]
    written = f"pictures are in {tmp_path / 'out'}, detections are in {path}\n"
    assert capsys.readouterr().out.endswith(written)
    (entry,) = json.loads(path.read_text())
    assert entry["detections"] == []


def test_batches_and_workers_are_those_of_the_command_line(
    arguments, images, tmp_path, monkeypatch
):
    given = []

    class Recorder(predictor.BatchPredictor):
        def __init__(self, *args):
            super().__init__(*args)
            given.append((self.batch_size, self.num_workers))

    monkeypatch.setattr(predictor, "BatchPredictor", Recorder)
    monkeypatch.setattr(runs, "count_cores", lambda: 1)
    loader = "dataloader.test.num_workers=4"
    for more in ([], ["--batch-size", "3", "--workers", "0"], [loader]):
        assert demo.main(arguments(images, more=["--output", tmp_path, *more])) == 0
    assert given == [(1, 0), (3, 0), (1, 1)]


def test_an_image_that_goes_before_it_is_drawn_is_a_failure(
    arguments, images, tmp_path, monkeypatch, capsys
):
    predict = TrainedDetector.predict_files

    def lose(*args):
        for prediction in predict(*args):
            if prediction.path.name == "b.png":
                prediction = dataclasses.replace(prediction, path=images / "lost.png")
            yield prediction

    monkeypatch.setattr(TrainedDetector, "predict_files", lose)
    assert demo.main(arguments(images)) == 1
    output = capsys.readouterr()
    assert f"{images / 'lost.png'}: skipped: unreadable image: No such file" in output.err
    assert "images: 2, detections: 16, failures: 1" in output.out
    assert names(tmp_path / "out") == ["a.png", "c.png"]


def test_class_names(trained):
    cfg = model_zoo.get_config(str(trained / "tiny.py"))
    assert class_metadata(cfg) is MetadataCatalog.get("digits_val")
    cfg.model.num_classes = 3
    assert class_metadata(cfg) is None
    cfg.dataloader.test.dataset.names = None
    assert class_metadata(cfg) is None


def test_contact_sheet(arguments, images, tmp_path):
    path = tmp_path / "sheets/sheet.png"
    assert demo.main(arguments(images, more=["--contact-sheet", path])) == 0
    with Image.open(path) as sheet:
        assert sheet.size == contact_sheet(sorted((tmp_path / "out").iterdir())).size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": "absent.py"}, "config 'absent.py' is neither a file nor"),
        ({"weights": "absent.pth"}, "weights absent.pth: there is no such file"),
        ({"weights": ""}, "give those of a trained detector with --weights FILE"),
        ({"more": ["--output", "out", "model.num_classes=3"]}, "set model.num_classes=10"),
        ({"more": ["--output", "out", "data.val_json=x"]}, "data.val_images missing"),
        ({"more": ["--output", "out", "model.num_clases=3"]}, "did you mean model.num_classes?"),
        ({"more": ["--track"]}, "--track numbers the objects of videos: give no images"),
    ],
)
def test_errors_are_one_line(arguments, images, capsys, change, message):
    with pytest.raises(SystemExit) as end:
        demo.main(arguments(images, **change))
    assert end.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--confidence-threshold", "30"], "given 30, accepted are numbers from 0 to 1"),
        (["--contact-sheet", "sheet.jpg"], "given sheet.jpg, accepted are names that end in .png"),
        (["--output", __file__], "is a file; give a folder"),
        (["--json", "found.txt"], "given found.txt, accepted are names that end in .json"),
        (["--batch-size", "0"], "given 0, accepted are whole numbers from 1 on"),
        (["--workers", "-1"], "given -1, accepted are whole numbers from 0 on"),
        (["--output", "out", "stray.jpg"], "given stray.jpg, accepted are options like key=value"),
    ],
)
def test_bad_arguments(arguments, images, capsys, more, message):
    with pytest.raises(SystemExit) as exit_info:
        demo.main(arguments(images, more=more))
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_something_has_to_be_written(arguments, images, capsys):
    for more, message in (
        ([], "nothing to write: give --output DIR for pictures, --json FILE.json, or both"),
        (["--json", "a.json", "--contact-sheet", "a.png"], "give --output DIR for them"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            demo.main(arguments(images, output=None, more=more))
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err


def test_runs_as_a_script(arguments, images, tmp_path):
    command = [sys.executable, str(ROOT / "demo/demo.py")]
    more = ["--output", "out", "model.num_classes=10", "--contact-sheet", "sheet.png"]
    (images / "b.png").write_text("broken")
    run = subprocess.run(
        [*command, *arguments(images, more=more)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "projects"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stderr
    assert run.stdout == "images: 2, detections: 16, failures: 1; pictures are in out\n"
    assert f"{images / 'b.png'}: skipped" in run.stderr
    assert (tmp_path / "sheet.png").is_file() and names(tmp_path / "out") == ["a.png", "c.png"]


def test_folders_keep_their_sub_folders(arguments, images, tmp_path):
    below = images / "x/y"
    below.mkdir(parents=True)
    shutil.copy(images / "a.jpg", below)
    # Its results are not its images when it is run again.
    for _ in range(2):
        assert demo.main(arguments(images, output=images / "out")) == 0
        found = {path.relative_to(images / "out") for path in (images / "out").rglob("*.*")}
        assert found == {Path(name) for name in ("a.png", "b.png", "c.png", "x/y/a.png")}


@pytest.mark.parametrize("suffix", ["jpg", "PNG", "webp", "bmp", "tif"])
def test_one_picture_in_the_format_of_its_name(arguments, images, tmp_path, capsys, suffix):
    output = tmp_path / f"new/one.{suffix}"
    assert demo.main(arguments(images / "a.jpg", output=output)) == 0
    with Image.open(output) as picture:
        assert picture.size == (60, 90)
        assert picture.format in (suffix.upper(), "JPEG", "TIFF")
    assert capsys.readouterr().out.endswith(f"; the result is {output}\n")


def test_one_file_is_for_one_image_and_not_that_image(arguments, images, capsys):
    before = (images / "a.jpg").read_bytes()
    one = "and the input has another number"
    for inputs, output, message in (
        ([images], "one.jpg", f"is for one image, {one} (images: 3, videos: 0)"),
        ([images / "a.jpg"], "one.mp4", f"is for one video, {one} (images: 1, videos: 0)"),
        ([images / "a.jpg"], images / "a.jpg", "would replace the input itself"),
    ):
        with pytest.raises(SystemExit):
            demo.main(arguments(*inputs, output=output))
        assert message in capsys.readouterr().err
    assert (images / "a.jpg").read_bytes() == before


def test_images_without_detections_name_their_best_scores(arguments, trained, images, capsys):
    cfg = model_zoo.get_config(str(trained / "tiny.py"))
    cfg.train.init_checkpoint = str(trained / "weights.pth")
    detector = TrainedDetector(cfg)
    best = {
        name: detector.predict(detector.read(images / name)[1]).scores[0].item()
        for name in ("a.jpg", "b.png", "c.jpg")
    }
    low, _, high = sorted(best, key=best.get)
    more = ["--confidence-threshold", (best[low] + best[high]) / 2]
    assert demo.main(arguments(images, more=more)) == 0
    hint = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"[12] of 3 files .* best scores: .*{low} {runs.round_down(best[low])}", hint)
    assert str(images / high) not in hint

    assert demo.main(arguments(images, more=["--confidence-threshold", "1"])) == 0
    hint = capsys.readouterr().err.splitlines()[-1]
    assert "3 of 3" in hint and hint.index(high) < hint.index(low)
    suggested = re.search(r"--confidence-threshold, such as to ([\d.]+),", hint)[1]
    assert best[high] / 1.1 < float(suggested) <= best[high]
    more = ["--confidence-threshold", suggested]
    assert demo.main(arguments(images / high, more=more)) == 0
    assert "detections: 0" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "score, text", [(0.2187, "0.21"), (0.29, "0.29"), (0.0123, "0.012"), (1e-4, "0.0001"), (0, "0")]
)
def test_scores_to_give_are_never_above_the_best(score, text):
    assert float(runs.round_down(score)) == float(text) <= score


@pytest.fixture
def clip(tmp_path):
    """A video of 7 frames."""
    path = tmp_path / "clip.mp4"
    rng = np.random.default_rng(0)
    with VideoWriter(path, 25.0) as writer:
        for number in range(7):
            pixels = rng.integers(0, 256, (96, 64, 3), dtype=np.uint8)
            writer.write(Frame(number, number / 25, pixels))
    return path


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_video_has_a_line_and_boxes_for_each_frame(
    arguments, trained, clip, tmp_path, capsys, batch_size
):
    report = tmp_path / "found.json"
    options = ["--json", report, "--batch-size", batch_size]
    assert demo.main(arguments(clip, output=tmp_path / "out", more=options)) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("videos: 1, frames: 7, detections: 56, failures: 0; videos are")
    assert "7/7" in printed.err
    entries = json.loads(report.read_text())
    assert [entry["frame"] for entry in entries] == list(range(7))
    assert [entry["time"] for entry in entries] == [0, 0.04, 0.08, 0.12, 0.16, 0.2, 0.24]
    with VideoReader(clip) as before, VideoReader(tmp_path / "out/clip.mp4") as after:
        assert after.num_frames == 7 and after.rate == 25
        pairs = list(zip(before, after))
    cfg = model_zoo.get_config(str(trained / "tiny.py"))
    cfg.train.init_checkpoint = str(trained / "weights.pth")
    single = TrainedDetector(cfg, threshold=0.0)
    for entry, (frame, drawn) in zip(entries, pairs):
        assert (entry["file_name"], entry["height"], entry["width"]) == (str(clip), 96, 64)
        assert frame.image.shape == drawn.image.shape and (frame.image != drawn.image).any()
        # As the same pixels in a file.
        path = tmp_path / "frame.png"
        Image.fromarray(frame.image[:, :, ::-1]).save(path)
        expected = single.predict(single.read(path)[1])
        scores = torch.tensor([detection["score"] for detection in entry["detections"]])
        torch.testing.assert_close(scores, expected.scores, rtol=0, atol=2e-5)


def test_slices_of_pictures_and_numbers_in_videos(arguments, images, clip, tmp_path):
    pytest.importorskip("sahi")
    pytest.importorskip("trackers")
    report = tmp_path / "found.json"
    assert demo.main(arguments(images, more=["--json", report, "--slice", 24])) == 0
    found = [len(entry["detections"]) for entry in json.loads(report.read_text())]
    # More than the eight that the detector finds in an image.
    assert max(found) > 8
    options = ["--json", report, "--track", "--confidence-threshold", "0.4"]
    demo.main(arguments(clip, more=options))
    entries = json.loads(report.read_text())
    assert len(entries) == 7
    assert all("track" in each for entry in entries for each in entry["detections"])


def test_videos_that_cannot_be_read_are_failures_beside_the_others(
    arguments, images, clip, tmp_path, capsys
):
    clip.rename(images / "clip.avi")
    (images / "broken.mp4").write_text("broken")
    report = tmp_path / "found.json"
    assert demo.main(arguments(images, output=tmp_path / "out", more=["--json", report])) == 1
    assert names(tmp_path / "out") == ["a.png", "b.png", "c.png", "clip.mp4"]
    printed = capsys.readouterr()
    assert "images: 3, videos: 1, frames: 7, detections: 80, failures: 1" in printed.out
    assert f"{images / 'broken.mp4'}: skipped: unreadable video" in printed.err
    problems = [entry for entry in json.loads(report.read_text()) if "problem" in entry]
    assert [Path(entry["file_name"]).name for entry in problems] == ["broken.mp4"]


@pytest.mark.parametrize("end", ["interrupt", "window"])
def test_a_camera_is_recorded_until_it_is_stopped(arguments, clip, tmp_path, monkeypatch, end):
    class Camera(VideoReader):
        def __init__(self, source):
            super().__init__(clip)
            assert source == 2
            self.is_camera, self.name, self.num_frames = True, "webcam 2", None

        def __iter__(self):
            for number, frame in enumerate(super().__iter__()):
                if number == 4 and end == "interrupt":
                    raise KeyboardInterrupt
                yield frame._replace(time=number / 5)

    class Window:
        shown = 0

        def show(self, image):
            assert image.shape == (96, 64, 3)
            self.shown += 1
            return self.shown < 4

    window = contextlib.nullcontext(Window() if end == "window" else None)
    monkeypatch.setattr(video, "VideoReader", Camera)
    monkeypatch.setattr(video, "open_window", lambda title, is_optional: window)
    command = [text for text in arguments("x", output=tmp_path / "out") if text not in "--input x"]
    report = tmp_path / "found.json"
    assert demo.main([*command, "--webcam", "2", "--json", str(report)]) == 0
    assert [entry["time"] for entry in json.loads(report.read_text())] == [0, 0.2, 0.4, 0.6]
    monkeypatch.undo()
    with VideoReader(tmp_path / "out/webcam.mp4") as recorded:
        # 25 frames a second, whatever the detector takes.
        assert len(list(recorded)) == 16
