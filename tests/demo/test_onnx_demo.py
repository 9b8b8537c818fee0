"""What demo/onnx_demo.py does before and around the detector."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import onnx_demo  # noqa: E402
from small_detectors import save_constant_detector  # noqa: E402


def test_resizes_as_detectron2_does():
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        width, height, short_side = torch.randint(20, 2000, (3,), generator=generator).tolist()
        max_size = short_side + 400
        expected = ResizeShortestEdge.get_output_shape(height, width, short_side, max_size)
        assert onnx_demo.resized(width, height, short_side, max_size) == expected[::-1]


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (96, 80)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_file_that_is_no_detector_of_ours_is_named(tmp_path, photo, capsys):
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "other", [value], [result])
    opsets = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, tmp_path / "other.onnx")
    (tmp_path / "broken.onnx").write_text("broken")
    for name, message in (
        ("other.onnx", "does not say how to prepare images; tools/export.py does"),
        ("broken.onnx", "cannot be loaded: "),
        ("absent.onnx", "cannot be loaded: "),
    ):
        model = str(tmp_path / name)
        arguments = ["--model", model, "--input", str(photo), "--output", str(tmp_path)]
        assert onnx_demo.main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path / name} {message}")


RESIZED = '{"channels": "RGB", "resize": {"short_side": 64, "max_size": 128}}'


@pytest.mark.parametrize(
    "metadata",
    [
        {"preprocessing": "{"},
        {"preprocessing": "[" * 100_000},
        {"preprocessing": "9" * 5000},
        {"preprocessing": "[]"},
        {"preprocessing": "{}"},
        {"preprocessing": '{"channels": "RGB"}'},
        {"preprocessing": '{"channels": "YUV", "resize": null}'},
        {"preprocessing": '{"channels": "RGB", "resize": [64, 128]}'},
        {"preprocessing": '{"channels": "RGB", "resize": {"short_side": 64}}'},
        {"preprocessing": RESIZED.replace("64", "0")},
        {"preprocessing": RESIZED.replace("64", "-64")},
        {"preprocessing": RESIZED.replace("64", "NaN")},
        {"preprocessing": RESIZED.replace("64", "64.5")},
        {"preprocessing": RESIZED.replace("128", "9" * 400)},
        {"preprocessing": RESIZED, "class_names": "cat"},
        {"preprocessing": RESIZED, "class_names": '{"0": "cat"}'},
        {"preprocessing": RESIZED, "class_names": "[1, 2]"},
    ],
)
def test_hostile_metadata_are_one_line(metadata, tmp_path, photo, capsys):
    save_constant_detector(tmp_path / "detector.onnx", **metadata)
    model = str(tmp_path / "detector.onnx")
    arguments = ["--model", model, "--input", str(photo), "--output", str(tmp_path / "out")]
    assert onnx_demo.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {model} holds metadata ") and error.count("\n") == 1


def test_what_metadata_may_lack_or_ask_for(tmp_path, photo, capsys):
    """No names, fewer than classes, and a size that no memory has room for."""
    model, report = tmp_path / "detector.onnx", tmp_path / "all.json"
    arguments = ["--model", str(model), "--input", str(photo), "--json", str(report)]
    for names, expected in (("[]", 1), ('["cat"]', 1), ('["cat", "dog"]', "dog")):
        save_constant_detector(model, preprocessing=RESIZED, class_names=names)
        assert onnx_demo.main(arguments) == 0
        (entry,) = json.loads(report.read_text())
        assert entry["detections"] == [
            {"class": expected, "score": 0.75, "box": [12.47, 25, 49.87, 62.5]}
        ]
    large = RESIZED.replace("64", "640000").replace("128", "9" * 18)
    save_constant_detector(model, preprocessing=large)
    assert onnx_demo.main(arguments) == 1
    assert "pixels, it is too large" in capsys.readouterr().err


def test_a_precision_that_the_file_or_the_processor_lacks_is_refused(photo, monkeypatch, capsys):
    options = ["--input", str(photo), "--json", str(photo.with_suffix(".json"))]
    with pytest.raises(SystemExit):
        onnx_demo.main(["--model", "a.onnx", "--precision", "bf16", *options])
    assert "--precision bf16 is for OpenVINO's files, in .xml" in capsys.readouterr().err
    # A stand-in for OpenVINO on a processor with float32 alone.
    core = SimpleNamespace(get_property=lambda device, name: ["FP32", "INT8"])
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core))
    assert onnx_demo.main(["--model", "a.xml", "--precision", "bf16", *options]) == 1
    assert "--precision is bf16, and this processor has f32" in capsys.readouterr().err
