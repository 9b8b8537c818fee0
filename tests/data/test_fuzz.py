"""Files and command lines of random damage: one line or a sound result, never a traceback.

Each test runs a few draws, and many where it is marked slow; those print what became of them.
"""

import argparse
import contextlib
import io
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from coco_datasets import CONTENT
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from programs import ROOT, TINY

from lite_detr.data.coco import register_coco
from lite_detr.data.evaluator import DetectionEvaluator
from lite_detr.data.image_files import read_record
from lite_detr.data.mapper import DetectionMapper
from lite_detr.errors import DatasetError, ImageError

HOSTILE = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    7,
    10**12,
    2**63,
    10**400,
    -0.0,
    0.5,
    1e-300,
    1e300,
    math.nan,
    math.inf,
    "",
    "0",
    "a.jpg",
    "../a.jpg",
    "/dev/zero",
    "\0",
    "\ud800",
    "$x$ %s {0}\n\u202e",
    "x" * 5000,
    [],
    [[]],
    [[[]]],
    [1, 2, 3, 4],
    [[1, 2, 3, 4]],
    [[1, 1, 9, 1, 9, 9]],
    {},
    {"id": 1},
    {"size": [80, 100], "counts": "Pj7"},
    {"size": [80, 100], "counts": "\u00e9"},
    {"size": "80", "counts": [8000]},
    {"size": [80, 100], "counts": [-1, 8001]},
]
RUNS = [
    pytest.param(60, id="few"),
    pytest.param(3000, id="many", marks=pytest.mark.slow),
]


def damage(value, rng):
    """Replace, remove, repeat or add one entry at a random place of a JSON value."""
    place, key = value, None
    while isinstance(place, (dict, list)) and place:
        parent, keys = place, list(place) if isinstance(place, dict) else range(len(place))
        key = rng.choice(list(keys))
        place = parent[key]
        if rng.random() < 0.25:
            break
    if key is None:
        return
    action = rng.random()
    if action < 0.7:
        parent[key] = rng.choice(HOSTILE)
    elif action < 0.85:
        del parent[key]
    elif isinstance(parent, list):
        parent.append(parent[key])
    else:
        names = ["segmentation", "keypoints", "area", "iscrowd", "ignore", "id", "image_id", "x"]
        parent[rng.choice(names)] = rng.choice(HOSTILE)


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


def write_damaged(path, rng):
    content = json.loads(json.dumps(CONTENT))
    for _ in range(rng.choice((1, 1, 2, 5))):
        damage(content, rng)
    data = json.dumps(content).encode()
    if rng.random() < 0.2:
        data = damage_bytes(data, rng)
    path.write_bytes(data)


def detect(record, is_found):
    """The objects of a record as detections, or none."""
    objects = record["annotations"] if is_found else []
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    return Instances(
        (record["height"], record["width"]),
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.ones(len(objects)),
        pred_classes=torch.tensor([a["category_id"] for a in objects], dtype=torch.int64),
    )


def evaluate(records, is_found):
    evaluator = DetectionEvaluator("fuzzed", tasks=("bbox",), distributed=False)
    evaluator.reset()
    for record in records:
        evaluator.process([record], [{"instances": detect(record, is_found)}])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()["bbox"]["AP"]


@pytest.mark.parametrize("number", RUNS)
def test_coco_files(number, tmp_path, images, warnings):
    for name, size in (("a.jpg", (100, 80)), ("sub/b.jpg", (60, 50))):
        Image.new("RGB", size).save(images / name)
    mapper = DetectionMapper(
        is_train=True,
        augmentations=[T.RandomFlip(), T.MinIoURandomCrop(), T.ResizeShortestEdge((32, 48), 64)],
        image_format="RGB",
    )
    outcomes = Counter()
    for seed in range(number):
        rng = random.Random(seed)
        path = tmp_path / "fuzzed.json"
        write_damaged(path, rng)
        try:
            summary = register_coco("fuzzed", path, images, for_evaluation=True)
        except DatasetError as error:
            assert str(error).isprintable() and len(str(error)) < 12_000, seed
            outcomes["refused"] += 1
            continue
        records = DatasetCatalog.get("fuzzed")
        assert len(records) == summary.num_images
        num_objects = 0
        for record in records:
            num_objects += sum(not a["iscrowd"] for a in record["annotations"])
            try:
                sample = mapper(record)
            except ImageError:
                outcomes["image of another size"] += 1
            else:
                assert torch.isfinite(sample["instances"].gt_boxes.tensor).all(), seed
        assert num_objects == summary.num_objects, seed
        found, missed = evaluate(records, True), evaluate(records, False)
        # Boxes that are dropped in training are objects all the same; no objects give NaN.
        assert not found > 100.0001 and not missed > 0, seed
        if summary.num_objects == len(json.loads(path.read_bytes())["annotations"]) > 0:
            assert found > 99.9, seed
        outcomes["used"] += 1
    assert all(message.isprintable() for message in warnings)
    assert outcomes["refused"] > number / 4 and outcomes["used"] > number / 10
    print(f"\n{number} COCO files: {dict(outcomes)}")


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


@pytest.mark.parametrize("number", RUNS)
def test_metadata_of_onnx_files(number, tmp_path, capsys):
    pytest.importorskip("onnx")
    onnx_demo = pytest.importorskip("onnx_demo")
    from onnx_files import save_constant_detector

    model, photo = tmp_path / "model.onnx", tmp_path / "photo.png"
    Image.new("RGB", (40, 30)).save(photo)
    arguments = ["--model", str(model), "--input", str(photo), "--output", str(tmp_path / "out")]
    outcomes = Counter()
    for seed in range(number):
        rng = random.Random(seed)
        resize = {"short_side": 64, "max_size": 128}
        metadata = {
            "preprocessing": {"channels": "RGB", "resize": resize},
            "class_names": ["cat", "dog"],
        }
        for _ in range(rng.choice((0, 1, 2))):
            damage(metadata, rng)
        given = {key: json.dumps(value) for key, value in metadata.items()}
        if rng.random() < 0.3 and given:
            key = rng.choice(list(given))
            given[key] = damage_bytes(given[key].encode(), rng).decode("utf-8", "ignore")
        save_constant_detector(model, **given)
        status = onnx_demo.main(arguments)
        error = capsys.readouterr().err
        assert status in (0, 1) and error.count("\n") == status, (seed, error)
        outcomes["run" if status == 0 else "one line"] += 1
    assert outcomes["run"] > number / 20 and outcomes["one line"] > number / 20
    with capsys.disabled():
        print(f"\n{number} ONNX files: {dict(outcomes)}")


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
def test_overrides_end_in_one_line_or_a_report(number, programs, capsys, tmp_path, monkeypatch):
    """Through a whole program, on paths and names that lead nowhere."""
    monkeypatch.chdir(tmp_path)
    words = [word for word in WORDS if "=" in word or word.startswith("~")]
    outcomes = Counter()
    for seed in range(number):
        rng = random.Random(seed)
        given = [rng.choice(words) for _ in range(rng.randrange(1, 4))]
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
