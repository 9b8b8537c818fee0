"""What demo/onnx_demo.py does before and around the detector."""

import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import onnx_demo  # noqa: E402


def test_resizes_as_detectron2_does():
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        width, height, short_side = torch.randint(20, 2000, (3,), generator=generator).tolist()
        max_size = short_side + 400
        expected = ResizeShortestEdge.get_output_shape(height, width, short_side, max_size)
        assert onnx_demo.resized(width, height, short_side, max_size) == expected[::-1]


def test_file_that_is_no_detector_of_ours_is_named(tmp_path, capsys):
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
        arguments = ["--model", str(tmp_path / name), "--input", "x", "--output", str(tmp_path)]
        assert onnx_demo.main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path / name} {message}")


def test_folder_gives_its_images_and_a_file_itself(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt"):
        (tmp_path / name).touch()
    found = onnx_demo.find_images([tmp_path, tmp_path / "notes.txt"])
    assert [path.name for path in found] == ["a.png", "b.JPG", "notes.txt"]
