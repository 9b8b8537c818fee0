"""What demo.py and onnx_demo.py do to files and names, which has to agree."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import demo
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data.detection_utils import read_image as read_by_detectron2
from PIL import Image

from lite_detr import cli, labels, model_zoo
from lite_detr.data import image_files
from lite_detr.data.image_files import read_image
from lite_detr.errors import ImageError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import onnx_demo  # noqa: E402
from programs import TINY  # noqa: E402
from small_detectors import save_constant_detector  # noqa: E402

NAMES = ["$_a^b$ 100%", "long\n" * 100]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    cfg = model_zoo.get_config(str(TINY))
    cfg.model.num_classes = 2
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"model": instantiate(cfg.model).state_dict()}, path)
    return path


@pytest.fixture(params=["demo", "onnx_demo"])
def run(request, weights, tmp_path, capsys):
    """``run(inputs, *options)``: the exit status, stdout and stderr of one of the programs."""
    resize = {"short_side": 64, "max_size": 128}
    content = {
        "images": [{"id": 1, "file_name": "x.png", "width": 9, "height": 9}],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES)],
    }
    folder = tmp_path / "detector"
    folder.mkdir()
    Image.new("RGB", (9, 9)).save(folder / "x.png")
    (folder / "val.json").write_text(json.dumps(content))
    if request.param == "demo":
        config = folder / "config.py"
        config.write_text(
            "import detectron2.data.transforms as T\n"
            "from detectron2.config import LazyCall as L\n"
            "from lite_detr import model_zoo\n"
            f"_base = model_zoo.get_config({str(TINY)!r})\n"
            "data, dataloader, model, train = (\n"
            "    _base[name] for name in ('data', 'dataloader', 'model', 'train'))\n"
            "dataloader.test.mapper.augmentations = [\n"
            "    L(T.ResizeShortestEdge)(\n"
            f"        short_edge_length={resize['short_side']}, max_size={resize['max_size']})]\n"
        )
        given = ["--config-file", config, "--weights", weights]
        given += [f"data.val_json={folder}/val.json", f"data.val_images={folder}"]
        main = demo.main
    else:
        preprocessing = json.dumps({"channels": "RGB", "resize": resize})
        path = folder / "detector.onnx"
        save_constant_detector(path, preprocessing=preprocessing, class_names=json.dumps(NAMES))
        given, main = ["--model", path], onnx_demo.main

    def run_program(inputs, *options):
        arguments = [*given[:4], *options, "--input", *inputs]
        overrides = ["--confidence-threshold=0", *given[4:]]
        status = main([*map(str, arguments), *map(str, overrides)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run_program


@pytest.fixture
def photos(tmp_path):
    """A folder with images of several kinds, some of which cannot be used."""
    folder = tmp_path / "photos"
    folder.mkdir()
    photo = Image.effect_noise((96, 80), 80).convert("RGB")
    for name in ("a.jpg", "a.png", "b[1].bmp", "ä $x$ %s.webp"):
        photo.save(folder / name)
    photo.save(folder / os.fsdecode(b"not \xff utf-8.png"))
    Image.new("RGB", (8, 8), "red").save(folder / "small.png")
    Image.new("RGB", (1, 300), "red").save(folder / "thin.png")
    Image.new("RGB", (1, 600), "red").save(folder / "thinner.png")
    Image.fromarray(np.full((80, 96), 0.5, np.float32)).save(folder / "float.tif")
    photo.save(folder / "script.eps")
    (folder / "script.eps").rename(folder / "script.jpg")
    (folder / "empty.png").touch()
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:2000])
    (folder / "notes.txt").write_text("not an image")
    os.mkfifo(folder / "pipe.jpg")
    return folder


USABLE = ["a.jpg", "a.png", "b[1].bmp", os.fsdecode(b"not \xff utf-8.png"), "small.png"]
USABLE += ["ä $x$ %s.webp"]
UNUSABLE = {
    "broken.png": "unreadable image: ",
    "empty.png": "unreadable image: not an image of the formats AVIF, BMP, GIF, JPEG, JPEG2000, ",
    "float.tif": "image of 32-bit pixels: 32 bits do not say what is black and what is white: ",
    "script.jpg": "unreadable image: not an image of the formats AVIF, BMP, GIF, JPEG, JPEG2000, ",
    "thin.png": "image too thin to resize: nothing is left of one side of its 1 x 300 pixels",
    "thinner.png": "image too thin to resize: 1 x 600 pixels are thinner than 1 : 500",
}


def test_every_file_of_a_folder_has_its_picture_or_its_reason(run, photos, tmp_path):
    report = tmp_path / "found" / "all.json"
    status, out, err = run([photos], "--output", tmp_path / "out", "--json", report)
    assert status == 1
    assert out.startswith(f"images: {len(USABLE)}, detections: ")
    assert f"failures: {len(UNUSABLE)}; pictures are in {tmp_path / 'out'}, " in out
    entries = {Path(e["file_name"]).name: e for e in json.loads(report.read_text("utf-8"))}
    assert sorted(entries) == sorted([*USABLE, *UNUSABLE])
    assert len(report.read_text("utf-8").splitlines()) == len(entries) + 2
    for name, reason in UNUSABLE.items():
        assert entries[name]["problem"].startswith(reason), entries[name]
        assert f"{photos / name}: skipped: {reason}" in err
    assert (entries["a.jpg"]["width"], entries["a.jpg"]["height"]) == (96, 80)
    assert {d["class"] for name in USABLE for d in entries[name]["detections"]} <= set(NAMES)
    pictures = {path.name for path in (tmp_path / "out").iterdir()}
    stems = {"a", "a_2", "b[1]", os.fsdecode(b"not \xff utf-8"), "small", "ä $x$ %s"}
    assert pictures == {f"{stem}.png" for stem in stems}
    assert os.fsencode(entries[USABLE[3]]["file_name"]).endswith(b"not \xff utf-8.png")


def test_files_patterns_and_what_names_none(run, photos, tmp_path):
    given = [photos / "a.jpg", photos / "*.png", photos / "a.jpg", photos / "b[1].bmp"]
    given += [photos / "*.gif", photos / "gone.jpg", photos / "pipe.jpg", "x" * 5000]
    report = tmp_path / "all.json"
    status, _, err = run(given, "--json", report)
    assert status == 1 and err.count("skipped, as it is not a file, a pattern of files or a") == 4
    found = [Path(entry["file_name"]).name for entry in json.loads(report.read_text("utf-8"))]
    pngs = sorted(path.name for path in photos.glob("*.png"))
    assert found == ["a.jpg", *pngs, "b[1].bmp"]


def test_no_picture_overwrites_another_or_an_image(run, photos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("a.jpg", "a.png"):
        shutil.copy(photos / name, other)
    before = (other / "a.png").read_bytes()
    assert run([other, photos / "a.jpg"], "--output", other)[0] == 0
    assert (other / "a.png").read_bytes() == before
    names = {path.name for path in other.iterdir()}
    assert names == {"a.jpg", "a.png", "a_2.png", "a_3.png", "a_4.png"}


def test_no_image_is_an_error(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert run([tmp_path / "empty"], "--output", tmp_path / "out")[0] == 1
    assert not (tmp_path / "out").exists()


def test_names_as_long_as_a_file_system_takes_them(run, photos, tmp_path):
    folder = tmp_path / "long"
    folder.mkdir()
    for name in ("x" * 251 + ".png", "x" * 250 + "y.jpg", "ä" * 125 + ".png"):
        shutil.copy(photos / "a.png", folder / name)
    assert run([folder], "--output", tmp_path / "out")[0] == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"x" * 240 + ".png", "x" * 240 + "_2.png", "ä" * 120 + ".png"}


@pytest.mark.parametrize(
    "options",
    [
        ["--output", "photos/a.jpg/out"],
        ["--output", "/proc/out"],
        ["--json", "photos/a.jpg/all.json"],
        ["--json", "folder.json"],
        ["--json", "x" * 300 + ".json"],
    ],
    ids=lambda options: options[1][:20],
)
def test_what_cannot_be_written_is_one_line_before_work_begins(
    options, run, photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    try:
        status, out, err = run([photos / "a.jpg"], *options)
    except SystemExit as end:
        status, (out, err) = end.code, capsys.readouterr()
    assert status == 1 and not out
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert "cannot be written" in line and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "nothing to write: give --output DIR for pictures, --json FILE.json, or both"),
        (["--output", __file__], "is a file; give a folder"),
        (["--json", "found.txt"], "given found.txt, accepted are names that end in .json"),
        (["--json", "a.json", "--confidence-threshold=30"], "accepted are numbers from 0 to 1"),
    ],
)
def test_bad_options(run, photos, capsys, options, problem):
    with pytest.raises(SystemExit) as end:
        run([photos / "a.jpg"], *options)
    assert end.value.code == 2
    assert problem in capsys.readouterr().err


@pytest.fixture
def files(photos):
    """Images of every kind that is read, the photographs included."""
    grey = np.tile(np.linspace(2000, 60000, 96), (80, 1))
    grey_16 = Image.fromarray(grey.astype(np.uint16))
    for name in ("grey.png", "grey.tif"):
        grey_16.save(photos / name)
    (photos / "grey.pgm").write_bytes(b"P5 96 80 65535\n" + grey.astype(">u2").tobytes())
    photo = Image.open(photos / "a.png")
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
        photo.convert(mode).save(photos / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    photo.convert("CMYK").save(photos / "CMYK.jpg")
    photo.save(photos / "frames.gif", save_all=True, append_images=[photo.rotate(90)])
    photo.save(photos / "photo.jp2")
    for orientation in range(10):
        exif = Image.Exif()
        exif[274] = orientation
        for suffix in ("jpg", "png", "webp", "tif"):
            photo.crop((0, 0, 96, 50)).save(photos / f"turned_{orientation}.{suffix}", exif=exif)
        grey_16.save(photos / f"grey_turned_{orientation}.png", exif=exif)
    return sorted(path for path in photos.iterdir() if path.suffix != ".txt")


def test_both_read_the_same_pixels_or_say_the_same(files):
    outcomes = set()
    for path in files:
        try:
            expected = image_files.read_record({"file_name": str(path)}, "RGB")
        except ImageError as error:
            with pytest.raises(ValueError) as raised:
                onnx_demo.read(path)
            assert str(raised.value) == str(error)
            outcomes.add(error.kind)
        else:
            found = np.asarray(onnx_demo.read(path))
            assert found.shape == expected.shape and (found == expected).all(), path
            outcomes.add("read")
    assert outcomes == {
        "read",
        "unreadable image",
        "image of 32-bit pixels",
        "image too thin to resize",
    }


def test_images_are_turned_upright(files):
    """As Detectron2 does by a private function, but for TIFF files, which it turns twice."""
    turns = dict(enumerate(("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE"), 2))
    turns |= dict(enumerate(("ROTATE_270", "TRANSVERSE", "ROTATE_90"), 6))
    turned = [path for path in files if path.name.startswith("turned_")]
    assert len(turned) == 40
    for path in turned:
        pixels = read_image(str(path), "RGB")
        as_saved = read_image(str(path.with_stem("turned_1")), "RGB")
        turn = turns.get(int(path.stem[-1]))
        upright = Image.fromarray(as_saved)
        upright = upright.transpose(Image.Transpose[turn]) if turn else upright
        if path.suffix in (".png", ".tif"):
            assert (pixels == np.asarray(upright)).all(), path
        if path.suffix != ".tif":
            assert (pixels == read_by_detectron2(str(path), "RGB")).all(), path
        assert pixels.shape[:2] == upright.size[::-1]


def test_what_the_program_that_is_copied_has_for_itself():
    assert onnx_demo.IMAGE_SUFFIXES == cli.IMAGE_SUFFIXES
    assert onnx_demo.IMAGE_FORMATS == image_files.IMAGE_FORMATS
    assert onnx_demo.MAX_ASPECT_RATIO == image_files.MAX_ASPECT_RATIO
    names = [*NAMES, "x" * 300, "\u202eabc", "a\0b\udcff", "\N{GRINNING FACE}\u200d", "שלום", " "]
    assert [onnx_demo.label(name) for name in names] == [labels.label(name) for name in names]


@pytest.mark.skipif(not shutil.which("gs"), reason="needs Ghostscript to be tempted")
def test_an_eps_file_named_jpg_starts_no_ghostscript(photos, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("started"))
    for read in (lambda path: read_image(str(path), "RGB"), onnx_demo.read):
        with pytest.raises(ValueError, match="not an image of the formats"):
            read(photos / "script.jpg")
