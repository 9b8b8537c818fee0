"""A small detector as OpenVINO's model: its detections on several sizes, and the demo."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image
from small_detectors import small_config

from lite_detr.commands import export as program
from lite_detr.errors import ExportError
from lite_detr.export import check, export_program, save_onnx
from lite_detr.export.onnx_file import check_packages

METADATA = {
    "class_names": json.dumps(['"Blüte"', "<猫>"], ensure_ascii=False),
    "preprocessing": json.dumps({"channels": "RGB", "resize": None}),
}


@pytest.mark.slow
def test_openvino_gives_what_the_detector_gives(tmp_path):
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    import onnx_demo

    from lite_detr.export.openvino_file import OpenvinoFile, save_openvino

    torch.manual_seed(0)
    detector = instantiate(small_config("dino", num_classes=2, detections_per_image=30)).eval()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    traced, onnx_file, path = export_program(detector), tmp_path / "a.onnx", tmp_path / "a.xml"
    # Last in 32 bits, in which both runtimes rank proposals alike.
    for dtype, limits in reversed(check.LIMITS.items()):
        save_onnx(traced, onnx_file, METADATA, dtype=dtype)
        save_openvino(onnx_file, path, METADATA)
        batches = check.sample_batches(detector)
        found, _ = check.check_onnx(OpenvinoFile(path), detector, batches, limits)
        assert found.scores <= limits.scores and found.boxes <= limits.boxes
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "a.onnx", "a.xml"]

    pixels = np.random.default_rng(0).integers(0, 256, (130, 170, 3), dtype=np.uint8)
    one, other = map(onnx_demo.OnnxDetector, (str(path), str(onnx_file)))
    assert one.class_names == other.class_names == ['"Blüte"', "<猫>"]
    results = [detect(Image.fromarray(pixels)) for detect in (one, other)]
    assert len(results[0].scores) == 20
    for first, second in zip(*results):
        np.testing.assert_allclose(first, second, atol=1e-2)
    path.with_suffix(".bin").unlink()
    with pytest.raises(ValueError, match="a.xml cannot be loaded: "):
        onnx_demo.OnnxDetector(str(path))


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = (
        r"the format needs openvino, which is not installed: pip install 'lite-detr\[openvino\]'"
    )
    with pytest.raises(ExportError, match=message):
        check_packages("openvino", extra="openvino")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "openvino", "--device", "cuda"], "openvino is traced on the CPU"),
        (["--format", "torchscript", "--dtype", "float16"], "is for --format onnx and openvino"),
    ],
)
def test_options_that_do_not_fit_the_format_are_refused(options, message, tmp_path, capsys):
    suffix = program.SUFFIXES[options[1]]
    with pytest.raises(SystemExit):
        program.main(["--config-file", "a", "--output", str(tmp_path / f"a{suffix}"), *options])
    assert message in capsys.readouterr().err
