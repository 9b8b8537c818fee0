"""TensorRT for RTX, which builds engines without a GPU by TensorRT's parser of ONNX files."""

import pytest
import torch
from detectron2.config import instantiate
from small_detectors import CONFIGS, small_config

from lite_detr.export import export_program, save_onnx
from lite_detr.export.onnx_file import DTYPES


def build_engine(trt, path):
    """Build for one to four images of 128 to 320 pixels; return the network and the engine."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [
        parser.get_error(i) for i in range(parser.num_errors)
    ]
    profile, config = builder.create_optimization_profile(), builder.create_builder_config()
    shapes = ((batch, 3, side, side) for batch, side in ((1, 128), (1, 224), (4, 320)))
    profile.set_shape("images", *shapes)
    profile.set_shape("image_sizes", (1, 2), (1, 2), (4, 2))
    config.add_optimization_profile(profile)
    return network, builder.build_serialized_network(network, config)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_an_engine_is_built_for_each_detector_and_type(name, tmp_path):
    trt, onnx = map(pytest.importorskip, ("tensorrt_rtx", "onnx"))
    pytest.importorskip("onnxscript")
    from lite_detr.export import onnx_half

    torch.manual_seed(0)
    detector = instantiate(small_config(name, detections_per_image=30)).eval()
    path, other, halves = tmp_path / "a.onnx", tmp_path / "b.onnx", {}
    save_onnx(export_program(detector), path, {})
    for dtype in DTYPES:
        model = onnx.load(path)
        if dtype != "float32":
            onnx_half.convert_to_half(model, decoder_only=dtype == "float16-decoder")
        onnx.save(model, other)
        network, engine = build_engine(trt, other)
        assert engine is not None
        results = [network.get_output(i) for i in range(network.num_outputs)]
        assert {result.name: tuple(result.shape) for result in results} == {
            "boxes": (-1, 30, 4),
            "scores": (-1, 30),
            "classes": (-1, 30),
        }
        # By the file's types, as sampling stays in 32 bits.
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        grids = [layer for layer in layers if layer.type == trt.LayerType.GRID_SAMPLE]
        assert grids and {layer.get_input(1).dtype for layer in grids} == {trt.float32}
        types = [layer.get_output(i).dtype for layer in layers for i in range(layer.num_outputs)]
        halves[dtype] = types.count(trt.float16)
    assert 0 == halves["float32"] < halves["float16-decoder"] < halves["float16"]
