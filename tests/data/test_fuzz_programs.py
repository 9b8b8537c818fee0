"""Programs on images and command lines of random damage: never a traceback, and both demos agree.

Damaged COCO files and ONNX metadata are in ``tests/test_fuzz.py``.
"""

import argparse
import contextlib
import io
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from programs import ROOT, TINY

from lite_detr.data.image_files import read_record
from lite_detr.errors import ImageError

RUNS = [
    pytest.param(60, id="few"),
    pytest.param(3000, id="many", marks=pytest.mark.slow),
]


def damage_bytes(data, rng):
    """Change, cut or repeat bytes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        position = rng.randrange(len(data)) if data else 0
        action = rng.random()
        if action < 0.6 and data:
            data[position] = rng.randrange(256)
        elif action < 0.8:
            del data[position : position + rng.randrange(64)]
        else:
            data[position:position] = data[position : position + rng.randrange(64)]
    return bytes(data)


@pytest.fixture(scope="module")
def image_bytes():
    """Images of every format, small enough that damage meets their headers."""
    photo = Image.effect_noise((40, 30), 80).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6
    found = []
    for kind in ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"):
        for image in (photo, photo.convert("L"), photo.convert("P")):
            file = io.BytesIO()
            options = {"exif": exif} if kind in ("JPEG", "PNG", "TIFF", "WEBP") else {}
            with contextlib.suppress(OSError):
                image.save(file, kind, **options)
                found.append(file.getvalue())
    grey = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    for kind in ("PNG", "TIFF"):
        file = io.BytesIO()
        grey.save(file, kind, exif=exif)
        found.append(file.getvalue())
    return found


@pytest.mark.parametrize("number", RUNS)
@pytest.mark.filterwarnings("ignore")
def test_images(number, image_bytes, tmp_path):
    """Both programs read the same pixels, or give the same reason."""
    onnx_demo = pytest.importorskip("onnx_demo")
    outcomes, path = Counter(), tmp_path / "image.jpg"
    for seed in range(number):
        rng = random.Random(seed)
        path.write_bytes(damage_bytes(rng.choice(image_bytes), rng))
        try:
            expected = read_record({"file_name": str(path)}, "RGB")
        except ImageError as error:
            assert str(error).isprintable() and len(str(error)) < 500, seed
            outcomes[error.kind] += 1
            with pytest.raises(ValueError) as raised:
                onnx_demo.read(path)
            assert str(raised.value).partition(":")[0] == error.kind, seed
        else:
            outcomes["read"] += 1
            assert expected.dtype == np.uint8 and expected.shape[2] == 3
            assert (np.asarray(onnx_demo.read(path)) == expected).all(), seed
    assert outcomes["read"] > number / 10 and outcomes["unreadable image"] > number / 10
    print(f"\n{number} images: {dict(outcomes)}")


WORDS = [
    *("--input", "--output", "--json", "--weights", "--model", "--workers", "--batch-size"),
    *("--confidence-threshold", "--contact-sheet", "--optimize", "--config-file", "--help-me"),
    *("--train", "--val", "--seed", "--eval-only", "--resume", "--num-gpus", "--", "-", "-1", ""),
    *("0", "1", "-5", "1e3", "nan", "inf", "0.3", "9" * 5000, "a.png", "a.json", "*", "[", "~"),
    *("float16", "float8", "=", "a=b", "=b", "a=", "data.val_json=", "data.val_json=1e3"),
    *("data.train_json=/dev/zero", "data.val_images=\udcff", "model.num_classes=x", "+x=1"),
    *("model.num_classes=-1", "model.num_classes=9" + "9" * 5000, "data=1", "data.val_json.x=1"),
    *("dataloader.test.dataset.names=[a,b]", "dataloader.test.dataset.names=5", "~data"),
    *("dataloader.train.dataset.names={}", "x" * 5000, "\udcff", "$x^2$", "it's", "(1)", "a b"),
    *("train.output_dir=2024_01", "dataloader.evaluator=[]", "model.queries=null", "train=null"),
]


@pytest.fixture
def programs(monkeypatch):
    """The parsers of the programs of users, by name."""
    for folder in ("tools", "demo", ""):
        monkeypatch.syspath_prepend(ROOT / folder)
    import check_dataset
    import demo
    import make_digits
    import onnx_demo

    modules = {"check_dataset": check_dataset, "demo": demo, "make_digits": make_digits}
    return modules | {"onnx_demo": onnx_demo}


@pytest.mark.parametrize("number", RUNS)
def test_command_lines_are_parsed_or_refused(number, programs, capsys):
    outcomes = Counter()
    for seed in range(number):
        rng = random.Random(seed)
        name = rng.choice(sorted(programs))
        words = [rng.choice(WORDS) for _ in range(rng.randrange(7))]
        # As Python's own, which escapes what it cannot encode; that of tests does not.
        stderr = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
        try:
            with contextlib.redirect_stderr(stderr):
                parsed = programs[name].parse_args(words)
        except SystemExit as end:
            assert end.code in (0, 2), (seed, words)
            outcomes["refused"] += 1
        else:
            assert isinstance(parsed, argparse.Namespace)
            outcomes["parsed"] += 1
    capsys.readouterr()
    with capsys.disabled():
        print(f"\n{number} command lines: {dict(outcomes)}")


@pytest.mark.parametrize(
    "number", [pytest.param(12, id="few"), pytest.param(400, id="many", marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore")
def test_overrides_end_in_one_line_or_a_report(
    number, programs, capsys, tmp_path, monkeypatch, images, write, content
):
    """Through a whole program, on paths and names that lead nowhere or to a small dataset."""
    monkeypatch.chdir(tmp_path)
    write(content, "val.json")
    Image.new("RGB", (100, 80)).save(images / "a.jpg")
    Image.new("RGB", (60, 50)).save(images / "sub" / "b.jpg")
    words = [word for word in WORDS if "=" in word or word.startswith("~")]
    outcomes = Counter()
    for seed in range(number):
        rng = random.Random(seed)
        given = ["data.val_json=val.json", "data.val_images=images"] * (rng.random() < 0.7)
        given += [rng.choice(words) for _ in range(rng.randrange(3))]
        stderr = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
        try:
            with contextlib.redirect_stderr(stderr):
                status = programs["check_dataset"].main([f"--config-file={TINY}", *given])
        except SystemExit as end:
            status = end.code
        stderr.flush()
        printed = stderr.buffer.getvalue().decode()
        assert status in (0, 1, 2), (seed, given)
        if status == 2:
            lines = [line for line in printed.splitlines() if "error: " in line]
            assert len(lines) == 1, (seed, given, printed)
        outcomes[status] += 1
    with capsys.disabled():
        print(f"\n{number} command lines of check_dataset.py, by exit status: {dict(outcomes)}")
