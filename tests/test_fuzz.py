"""Damaged and hostile inputs: one line for each that is refused, and never a wrong answer.

The short runs belong to ``make test``; ``make test-all`` tries thousands. Files of weights have
theirs in ``tests/checkpoint/test_hostile_files.py``.
"""

import contextlib
import copy
import io
import json
import random
import warnings

import numpy as np
import pytest
import torch
from coco_datasets import CONTENT, picture
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from fuzzing import HOSTILE_VALUES, damaged, distorted
from PIL import Image
from programs import TINY
from small_detectors import save_constant_detector

from lite_detr.data.coco import register_coco
from lite_detr.data.evaluator import DetectionEvaluator
from lite_detr.data.image_files import read_image
from lite_detr.errors import ImageError
from lite_detr.overrides import apply_overrides, load_config


def counts(short, long):
    """Parametrize a test by how many inputs it tries."""
    return pytest.mark.parametrize("count", [short, pytest.param(long, marks=pytest.mark.slow)])


@pytest.fixture
def rng():
    return random.Random(0)


NAME = "fuzz"


@pytest.fixture
def coco(tmp_path):
    """``coco(text)``: registers, loads and evaluates a dataset with that text in its JSON file."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for image in CONTENT["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(root / image["file_name"])
    path = tmp_path / "instances.json"

    def use(text):
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        register_coco(NAME, str(path), str(root), for_evaluation=True)
        records = DatasetCatalog.get(NAME)
        classes = MetadataCatalog.get(NAME).thing_classes
        for record in records:
            assert record["width"] >= 1 and record["height"] >= 1
            for annotation in record["annotations"]:
                assert 0 <= annotation["category_id"] < len(classes)
                x, y, width, height = annotation["bbox"]
                assert width > 0 and height > 0, annotation
                assert x >= 0 and x + width <= record["width"] + 1e-6, annotation
                assert y >= 0 and y + height <= record["height"] + 1e-6, annotation
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator = DetectionEvaluator(NAME, tasks=("bbox",), distributed=False)
            evaluator.reset()
            for record in records:
                instances = Instances((record["height"], record["width"]))
                instances.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
                instances.scores = torch.tensor([0.5])
                instances.pred_classes = torch.tensor([0])
                evaluator.process([record], [{"instances": instances}])
            results = evaluator.evaluate()["bbox"]
        # No object is as small as the one detection, so that nothing is found.
        wrong = {name: ap for name, ap in results.items() if ap > 0}
        assert not wrong or any(
            min(annotation["bbox"][2:]) < 3 for r in records for annotation in r["annotations"]
        ), wrong

    yield use
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(NAME, None)


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


@counts(150, 10_000)
def test_coco_files_with_distorted_values(fuzz, coco, rng, count):
    contents = (json.dumps(distorted(rich_content(), rng)) for _ in range(count))
    outcomes = fuzz("values of COCO files", contents, coco)
    assert outcomes["used"] > count // 10 and outcomes["refused"] > count // 10


@counts(150, 10_000)
def test_coco_files_with_damaged_text(fuzz, coco, rng, count):
    raw = json.dumps(rich_content()).encode()
    outcomes = fuzz("text of COCO files", (damaged(raw, rng) for _ in range(count)), coco)
    assert outcomes["refused"] > count // 10


IMAGES = [
    *(("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "RGBA")),
    *(("PNG", "P"), ("PNG", "I;16"), ("PNG", "1"), ("TIFF", "RGB"), ("TIFF", "I;16")),
    *(("TIFF", "F"), ("GIF", "P"), ("BMP", "RGB"), ("WEBP", "RGB"), ("PPM", "L")),
]


def damaged_pictures(rng, count):
    """Bytes of picture files of every kind, 33 x 21."""
    files = []
    for file_format, mode in IMAGES:
        buffer = io.BytesIO()
        picture(rng, 33, 21, mode).save(buffer, file_format)
        files.append(buffer.getvalue())
    for number in range(count):
        yield damaged(files[number % len(files)], rng)


@counts(300, 20_000)
def test_damaged_pictures(fuzz, rng, count, tmp_path):
    path = tmp_path / "picture"

    def read(raw):
        path.write_bytes(raw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = read_image(str(path), "BGR")
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        assert min(pixels.shape) > 0

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


def command_lines(rng, count):
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


@counts(300, 10_000)
def test_command_lines(fuzz, rng, count):
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

    outcomes = fuzz("command lines", command_lines(rng, count), use)
    assert outcomes["used"] > count // 20 and outcomes["refused"] > count // 10


METADATA = {
    "preprocessing": {"channels": "RGB", "resize": {"short_side": 64, "max_size": 128}},
    "class_names": ["cat", "dog"],
}


@counts(100, 3_000)
def test_metadata_of_onnx_files(fuzz, rng, count, tmp_path, capsys):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    import onnx_demo

    Image.new("RGB", (96, 80)).save(tmp_path / "photo.png")
    model, report = tmp_path / "detector.onnx", tmp_path / "all.json"
    arguments = ["--model", model, "--input", tmp_path / "photo.png", "--json", report]

    def use(texts):
        report.unlink(missing_ok=True)
        save_constant_detector(model, **texts)
        status = onnx_demo.main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        if status:
            assert "Traceback" not in error and 0 < error.count("\n") <= 2
            raise ImageError("refused", "by the program")
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
            yield texts

    outcomes = fuzz("metadata of ONNX files", metadata(), use)
    assert outcomes["used"] > count // 20 and outcomes["refused"] > count // 20
