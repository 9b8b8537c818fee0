"""Damaged and hostile inputs: one line for each that is refused, and never a wrong answer.

The short runs belong to ``make test``; ``make test-all`` tries thousands. Weight files have theirs
in ``tests/checkpoint/test_hostile_files.py``.
"""

import argparse
import contextlib
import copy
import io
import json
import random

import numpy as np
import pytest
import torch
from coco_datasets import CONTENT, EXIF_ORIENTATION, picture
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, Instances
from fuzzing import HOSTILE_VALUES, damaged, distorted
from PIL import Image
from programs import TINY
from small_detectors import save_constant_detector

from lite_detr.commands import check_data, make_digits, predict
from lite_detr.data.coco import register_coco
from lite_detr.data.evaluator import DetectionEvaluator
from lite_detr.data.image_files import read_record
from lite_detr.data.mapper import DetectionMapper
from lite_detr.errors import ConfigError, ImageError
from lite_detr.overrides import apply_overrides, load_config


def counts(short, long):
    """Parametrize a test by the number of inputs that it tries."""
    return pytest.mark.parametrize("count", [short, pytest.param(long, marks=pytest.mark.slow)])


@pytest.fixture
def rng():
    return random.Random(0)


def detect(record, is_found):
    """Return the objects of a record as detections, or none."""
    objects = record["annotations"] if is_found else []
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    return Instances(
        (record["height"], record["width"]),
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.ones(len(objects)),
        pred_classes=torch.tensor([a["category_id"] for a in objects], dtype=torch.int64),
    )


def evaluate(name, records, is_found):
    evaluator = DetectionEvaluator(name, tasks=("bbox",), distributed=False)
    evaluator.reset()
    for record in records:
        evaluator.process([record], [{"instances": detect(record, is_found)}])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()["bbox"]["AP"]


@pytest.fixture
def use_coco(tmp_path):
    """``use_coco(raw)``: registers, maps and evaluates a dataset with those bytes as its file."""
    root, path, name = tmp_path / "images", tmp_path / "instances.json", "fuzzed"
    (root / "sub").mkdir(parents=True)
    for image in CONTENT["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(root / image["file_name"])
    mapper = DetectionMapper(
        is_train=True,
        augmentations=[T.RandomFlip(), T.MinIoURandomCrop(), T.ResizeShortestEdge((32, 48), 64)],
        image_format="RGB",
    )

    def use(raw):
        path.write_bytes(raw)
        summary = register_coco(name, path, root, for_evaluation=True)
        records = DatasetCatalog.get(name)
        assert len(records) == summary.num_images
        for record in records:
            assert record["width"] >= 1 and record["height"] >= 1
            for annotation in record["annotations"]:
                assert 0 <= annotation["category_id"] < len(summary.categories)
                x, y, width, height = annotation["bbox"]
                assert width > 0 and height > 0 and x >= 0 and y >= 0
                assert x + width <= record["width"] + 1e-6
                assert y + height <= record["height"] + 1e-6
            # The file may say another size than the image has.
            with contextlib.suppress(ImageError):
                assert mapper(record)["instances"].gt_boxes.tensor.isfinite().all()
        objects = sum(not a["iscrowd"] for record in records for a in record["annotations"])
        assert objects == summary.num_objects
        found, missed = evaluate(name, records, True), evaluate(name, records, False)
        # Boxes that are dropped in training are objects all the same; no objects give NaN.
        assert not found > 100.0001 and not missed > 0
        if objects == len(json.loads(raw)["annotations"]) > 0:
            assert found > 99.9

    yield use
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(name, None)


def rich_content():
    """A dataset with all that a COCO file may hold."""
    content = copy.deepcopy(CONTENT)
    first, second = content["annotations"]
    first["segmentation"] = [[10.0, 10.5, 30.0, 10.5, 30.0, 40.5]]
    first["keypoints"] = [10, 10, 2, 20, 20, 1]
    first["num_keypoints"] = 2
    second["segmentation"] = {"counts": [0, 8000], "size": [80, 100]}
    second["iscrowd"] = 1
    content["info"] = {"year": 2026}
    content["licenses"] = [{"id": 1, "name": "none"}]
    return content


@counts(100, 5_000)
def test_coco_files_with_hostile_values(fuzz, use_coco, rng, count):
    contents = (json.dumps(distorted(rich_content(), rng)).encode() for _ in range(count))
    outcomes = fuzz("values of COCO files", contents, use_coco)
    assert outcomes["used"] > count // 10 and outcomes["refused"] > count // 10


@counts(100, 5_000)
def test_coco_files_with_damaged_bytes(fuzz, use_coco, rng, count):
    raw = json.dumps(rich_content()).encode()
    outcomes = fuzz("bytes of COCO files", (damaged(raw, rng) for _ in range(count)), use_coco)
    assert outcomes["refused"] > count // 10


IMAGES = [
    *(("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "RGBA")),
    *(("PNG", "P"), ("PNG", "I;16"), ("PNG", "1"), ("TIFF", "RGB"), ("TIFF", "I;16")),
    *(
        ("TIFF", "F"),
        ("GIF", "P"),
        ("BMP", "RGB"),
        ("WEBP", "RGB"),
        ("PPM", "L"),
        ("JPEG2000", "RGB"),
    ),
]


def damaged_pictures(rng, count):
    """Bytes of picture files of every kind, 33 x 21."""
    turned, files = Image.Exif(), []
    turned[EXIF_ORIENTATION] = 6
    for file_format, mode in IMAGES:
        buffer = io.BytesIO()
        options = {"exif": turned} if file_format in ("JPEG", "PNG", "TIFF", "WEBP") else {}
        picture(rng, 33, 21, mode).save(buffer, file_format, **options)
        files.append(buffer.getvalue())
    for number in range(count):
        yield damaged(files[number % len(files)], rng)


@counts(300, 20_000)
@pytest.mark.filterwarnings("ignore")
def test_pictures(fuzz, rng, count, tmp_path):
    """Training and onnx_demo.py read the same pixels, or give the same reason."""
    onnx_demo = pytest.importorskip("onnx_demo")
    path = tmp_path / "picture.jpg"

    def read(raw):
        path.write_bytes(raw)
        try:
            expected = read_record({"file_name": str(path)}, "RGB")
        except ImageError as error:
            assert str(error).isprintable() and len(str(error)) < 500
            with pytest.raises(ValueError) as raised:
                onnx_demo.read(path)
            assert str(raised.value).partition(":")[0] == error.kind
            raise
        assert expected.dtype == np.uint8 and expected.shape[2] == 3
        assert (np.asarray(onnx_demo.read(path)) == expected).all()

    outcomes = fuzz("pictures", damaged_pictures(rng, count), read)
    assert outcomes["used"] > count // 10 and outcomes["refused"] > count // 10


CHARACTERS = (
    "abz019.,:;=+-_~/\\ '\"()[]{}$%#@!&|<>*?\t\nnulltrue1e9\N{LATIN SMALL LETTER E WITH ACUTE}"
)
KEYS = [
    *("train.output_dir", "train.max_iter", "train.device", "optimizer.lr", "data.train_json"),
    *("model.num_classes", "model.backbone", "model.encoder", "dataloader.train.num_workers"),
    *("dataloader.test", "model.pixel_mean", "train.ema", "nowhere", "train.nowhere", "model.a.b"),
]
TEXT_KEYS = {"train.output_dir", "data.train_json"}


def overrides(rng, count):
    """Overrides of one to three arguments."""
    for _ in range(count):
        arguments = []
        for _ in range(rng.randrange(1, 4)):
            value = "".join(rng.choices(CHARACTERS, k=rng.randrange(12)))
            if rng.random() < 0.2:
                value = repr(rng.choice(HOSTILE_VALUES))
            prefix = rng.choice(["", "", "", "+", "++", "~"])
            arguments.append(f"{prefix}{rng.choice(KEYS)}{rng.choice(['=', '=', '=', ''])}{value}")
        yield arguments


@counts(150, 10_000)
def test_overrides(fuzz, rng, count):
    config = load_config(str(TINY), [])

    def use(arguments):
        cfg = apply_overrides(copy.deepcopy(config), arguments)
        key, _, text = arguments[-1].partition("=")
        if key in TEXT_KEYS and "$" not in text and text not in ("null", ""):
            quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
            section, name = key.split(".")
            assert cfg[section][name] == (text[1:-1] if quoted else text)
        # Unless a "+" sets any value, a key keeps its type.
        if not any(argument.startswith("+") for argument in arguments):
            assert isinstance(cfg.train.max_iter, int)
            assert isinstance(cfg.optimizer.lr, int | float)

    outcomes = fuzz("overrides", overrides(rng, count), use)
    assert outcomes["used"] > count // 20 and outcomes["refused"] > count // 10


METADATA = {
    "preprocessing": {"channels": "RGB", "resize": {"short_side": 64, "max_size": 128}},
    "class_names": ["cat", "dog"],
}


@counts(100, 3_000)
def test_metadata_of_onnx_files(fuzz, rng, count, tmp_path, capsys):
    pytest.importorskip("onnx")
    onnx_demo = pytest.importorskip("onnx_demo")
    Image.new("RGB", (96, 80)).save(tmp_path / "photo.png")
    model, report = tmp_path / "detector.onnx", tmp_path / "all.json"
    arguments = ["--model", model, "--input", tmp_path / "photo.png", "--json", report]

    def use(texts):
        report.unlink(missing_ok=True)
        save_constant_detector(model, **texts)
        status = onnx_demo.main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert status in (0, 1) and error.count("\n") == status, error
        if status:
            raise ConfigError(error.strip())
        (entry,) = json.loads(report.read_text())
        # The file's box, whatever it says of classes; it may lie outside of a smaller image.
        assert [found["score"] for found in entry["detections"]] in ([0.75], [])

    def metadata():
        for _ in range(count):
            texts = {name: json.dumps(value) for name, value in METADATA.items()}
            name = rng.choice(list(texts))
            if rng.random() < 0.5:
                texts[name] = json.dumps(distorted(METADATA[name], rng))
            else:
                texts[name] = damaged(texts[name].encode(), rng).decode("utf-8", "replace")
            if rng.random() < 0.1:
                del texts[name]
            yield texts

    outcomes = fuzz("metadata of ONNX files", metadata(), use)
    assert outcomes["used"] > count // 20 and outcomes["refused"] > count // 20


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
def programs():
    """The modules of users' programs, by name."""
    onnx_demo = pytest.importorskip("onnx_demo")
    return {"check": check_data, "demo": predict, "digits": make_digits, "onnx_demo": onnx_demo}


def call_program(function, words):
    """Call a program's function, and return its result and what it wrote to stderr."""
    # As Python's own stream, which escapes what it cannot encode; that of tests does not.
    stderr = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    try:
        with contextlib.redirect_stderr(stderr):
            result = function(words)
    except SystemExit as end:
        result = end.code
    stderr.flush()
    return result, stderr.buffer.getvalue().decode()


def choose_words(rng, count, words, most):
    for _ in range(count):
        yield rng.choices(words, k=rng.randrange(most))


@counts(200, 10_000)
def test_command_lines(fuzz, rng, count, programs, capsys):
    """They are parsed, or refused with a usage message."""

    def parse(words):
        name = sorted(programs)[len(str(words)) % len(programs)]
        result, error = call_program(programs[name].parse_args, words)
        if not isinstance(result, argparse.Namespace):
            assert result in (0, 2), result
            raise ConfigError(error.strip().splitlines()[-1] if error else "help")

    fuzz("command lines", choose_words(rng, count, WORDS, 7), parse)
    capsys.readouterr()


@counts(12, 600)
@pytest.mark.filterwarnings("ignore")
def test_overrides_of_a_program(fuzz, rng, count, programs, capsys, tmp_path, monkeypatch):
    """check-data as a whole, on paths and names that lead nowhere."""
    monkeypatch.chdir(tmp_path)
    words = [word for word in WORDS if "=" in word or word.startswith("~")]

    def check(given):
        main = programs["check"].main
        status, error = call_program(main, [f"--config-file={TINY}", *given])
        assert status in (0, 1, 2)
        if status == 2:
            [line] = [line for line in error.splitlines() if "error: " in line]
            raise ConfigError(line)

    fuzz("command lines of check-data", choose_words(rng, count, words, 4), check)
    capsys.readouterr()
