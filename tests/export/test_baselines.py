"""The models to compare with in ONNX: a file computes what the detector does, at any size."""

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from small_detectors import TinyBackbone, narrow

from lite_detr import model_zoo
from lite_detr.export import check, export_program, onnx_metadata, save_onnx
from lite_detr.export.check import OnnxFile, check_onnx

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

NAMES = [name for name in model_zoo.list_configs() if name.startswith("baselines/")]
# One of each meta-architecture.
SAMPLE = {model_zoo.get_config(name).model._target_.__name__: name for name in NAMES}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE.values())
def test_a_file_gives_what_the_detector_gives(name, tmp_path):
    cfg = model_zoo.get_config(name)
    model = narrow(cfg.model)
    model.backbone = L(TinyBackbone)()
    model.num_classes, model.queries.num_queries, model.detections_per_image = 5, 20, 20
    # IMFA samples tokens in all layers but the first.
    layers = 3 if "/imfa_" in name else 2
    model.encoder["num_blocks" if "num_blocks" in model.encoder else "num_layers"] = layers
    model.decoder.heads.num_layers = layers
    torch.manual_seed(0)
    detector = instantiate(model).eval()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    file = tmp_path / "detector.onnx"
    save_onnx(export_program(detector), file, onnx_metadata(cfg, name))
    found, reordering = check_onnx(OnnxFile(file), detector, list(check.sample_batches(detector)))
    assert found.scores < 1e-5 and found.boxes < 1e-4
    assert reordering.gap < 1e-5
