"""A whole detector in ONNX, made once, and what is run from its file: ours and the demo's."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image
from programs import ROOT
from small_detectors import small_config
from tensorrt_support import refusals

from lite_detr import model_zoo
from lite_detr.export import (
    ExportError,
    check,
    compile_program,
    export_program,
    onnx_metadata,
    save_onnx,
)
from lite_detr.export.check import OnnxFile, check_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


import onnx_demo  # noqa: E402

from lite_detr.export.onnx_half import convert_to_half, half_tensor  # noqa: E402
from lite_detr.export.onnx_rewrites import convert_opset  # noqa: E402


class Exported:
    """A small detector, whose decoder weighs points as Deformable DETR does and whose encoder is
    key-aware, its config, what was traced, and its file."""

    def __init__(self, folder):
        cfg = model_zoo.get_config("digits/lite_dino_efficientnet_lite0.py")
        cfg.model = small_config("dino", num_levels=2, num_classes=10, detections_per_image=30)
        cfg.model.in_features = ["res3", "res4"]
        cfg.model.encoder.num_high_levels = 1
        cfg.model.decoder.layer.attention = cfg.model.encoder.layer.attention.copy()
        cfg.model.decoder.layer.attention._target_ = (
            "lite_detr.modeling.MultiScaleDeformableAttention"
        )
        cfg.model.encoder.updates_per_block = cfg.model.decoder.heads.num_layers = 1
        cfg.dataloader.test.mapper.augmentations = [
            L(ResizeShortestEdge)(short_edge_length=80, max_size=120)
        ]
        cfg.dataloader.test.mapper.image_format = "BGR"
        self.cfg = cfg
        torch.manual_seed(0)
        self.detector = instantiate(cfg.model).eval()
        with torch.no_grad():
            for parameter in self.detector.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        self.program, self.onnx = export_program(self.detector), folder / "detector.onnx"
        save_onnx(self.program, self.onnx, onnx_metadata(cfg, "small.py"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return Exported(tmp_path_factory.mktemp("exported"))


@pytest.fixture
def images(tmp_path):
    """Three sizes, of which one is turned by its EXIF orientation and one has a palette."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, (width, height) in {"a.png": (60, 90), "b.png": (300, 70), "c.jpg": (90, 60)}.items():
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        exif = Image.Exif()
        if name == "b.png":
            image = image.quantize(16)
        if name == "c.jpg":
            exif[274] = 6
        image.save(folder / name, exif=exif)
    return folder


def test_onnx_gives_what_the_detector_gives(exported):
    """One image, two, and two of which one has noise for padding; no size is the traced one."""
    batches = list(check.sample_batches(exported.detector))
    assert [len(sizes) for _, sizes in batches] == [1, 2, 2]
    found, reordering = check_onnx(OnnxFile(exported.onnx), exported.detector, batches)
    assert found.scores < 1e-5 and found.boxes < 1e-5
    assert reordering.gap < 1e-5


def with_weights(exported, name, change, folder):
    """The detector and its file with other weights of a linear layer, which no other one has."""
    detector, model = copy.deepcopy(exported.detector), onnx.load(exported.onnx)
    weights = detector.get_submodule(name).weight.detach().numpy()
    [stored] = (
        tensor
        for tensor in model.graph.initializer
        for values in (weights, weights.T)
        if np.array_equal(onnx.numpy_helper.to_array(tensor), values)
    )
    changed = change(onnx.numpy_helper.to_array(stored))
    stored.CopyFrom(onnx.numpy_helper.from_array(changed, stored.name))
    onnx.save(model, folder / "changed.onnx")
    weights[:] = change(weights)
    return detector, folder / "changed.onnx"


def test_proposals_that_tie_are_taken_in_the_order_of_the_file(exported, tmp_path):
    """All of them do, and those who break ties may do so as they like."""
    detector, path = with_weights(exported, "queries.class_embed", np.zeros_like, tmp_path)
    batches = list(check.sample_batches(detector))
    file = OnnxFile(path)
    found, reordering = check_onnx(file, detector, batches)
    assert reordering.moved > 0 and reordering.gap == 0
    assert found.scores < 1e-5 and found.boxes < 1e-5
    # Left to themselves they would differ, so that it is the order that makes them agree.
    alone = check.check_batches(
        lambda *batch: file.run(*batch)[0], check.run_detector(detector), batches
    )
    assert max(alone) > check.FLOAT_LIMITS.scores


def test_a_file_that_ranks_proposals_otherwise_is_wrong(exported, tmp_path):
    _, path = with_weights(exported, "queries.class_embed", lambda values: -values, tmp_path)
    with pytest.raises(ExportError, match="changed.onnx ranks proposals otherwise, by .* is wrong"):
        check_onnx(OnnxFile(path), exported.detector, check.sample_batches(exported.detector))


def test_onnx_has_standard_operators_named_sizes_and_metadata(exported):
    model = onnx.load(exported.onnx)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert "GridSample" in {node.op_type for node in model.graph.node}
    # Nothing is computed twice.
    done = [(node.op_type, *node.input, *map(str, node.attribute)) for node in model.graph.node]
    assert len(done) == len(set(done))
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "images": ["batch", 3, "height", "width"],
        "image_sizes": ["batch", 2],
        "boxes": ["batch", "detections", 4],
        "scores": ["batch", "detections"],
        "classes": ["batch", "detections"],
    }
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["class_names"]) == list("0123456789")
    assert json.loads(metadata["preprocessing"]) == {
        "channels": "BGR",
        "resize": {"short_side": 80, "max_size": 120},
    }
    assert metadata["config"] == "small.py" and metadata["lite_detr_version"]


def run_both(exported, path, limits=check.FLOAT_LIMITS):
    batches = check.sample_batches(exported.detector)
    return check_onnx(OnnxFile(path), exported.detector, batches, limits)


def assert_that_any_tool_reads(model):
    """Constants are tensors that have a name, and names hold what identifiers and modules do."""
    assert "Constant" not in {node.op_type for node in model.graph.node}
    names = {name for node in model.graph.node for name in (node.name, *node.output)}
    names |= {tensor.name for tensor in model.graph.initializer}
    assert all(re.fullmatch(r"[A-Za-z_][\w.]*", name) for name in names)


@pytest.mark.parametrize("opset", [16, 17, 20, 23])
def test_other_opsets_give_the_same(exported, opset, tmp_path):
    model = convert_opset(onnx.load(exported.onnx), opset)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import] == [opset]
    assert ("LayerNormalization" in {node.op_type for node in model.graph.node}) == (opset > 16)
    assert_that_any_tool_reads(model)
    onnx.save(model, tmp_path / "other.onnx")
    found, _ = run_both(exported, tmp_path / "other.onnx")
    assert max(found) < 1e-5


@pytest.mark.parametrize("opset", [17, 18])
def test_16_bits_keep_geometry_and_scores_in_32(exported, opset, tmp_path):
    model = onnx.load(exported.onnx)
    convert_to_half(model)
    model = convert_opset(model, opset)
    assert_that_any_tool_reads(model)
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}

    def kinds_of(operator, position=0):
        nodes = [node for node in graph.node if node.op_type == operator]
        return {onnx.TensorProto.DataType.Name(kinds[node.input[position]]) for node in nodes}

    assert kinds_of("Conv", 1) == {"FLOAT16"}
    exact = [("GridSample", 1), ("TopK", 0), ("Softmax", 0), ("LayerNormalization", 0), ("Sin", 0)]
    for operator, position in exact:
        assert kinds_of(operator, position) == {"FLOAT"}
    # Layers of features, and those that give scores, boxes and sampling locations.
    assert kinds_of("MatMul") == {"FLOAT16", "FLOAT"}
    assert {value.type.tensor_type.elem_type for value in graph.output} == {1, 7}
    onnx.save(model, tmp_path / "half.onnx")
    limits = check.LIMITS["float16"]
    found, reordering = run_both(exported, tmp_path / "half.onnx", limits)
    assert 1e-5 < found.scores < limits.scores and found.boxes < limits.boxes
    assert reordering.gap < limits.logits


def test_a_decoder_in_16_bits_gets_the_proposals_of_32(exported, tmp_path):
    """The detections as they are, the detector taking its own order."""
    model = onnx.load(exported.onnx)
    convert_to_half(model, decoder_only=True)
    onnx.save(model, tmp_path / "half.onnx")
    file, batches = OnnxFile(tmp_path / "half.onnx"), check.sample_batches(exported.detector)
    found = check.check_batches(
        lambda *batch: file.run(*batch)[0], check.run_detector(exported.detector), batches
    )
    assert 1e-5 < found.scores < 1e-3 and found.boxes < 1e-3
    assert file.path.stat().st_size < exported.onnx.stat().st_size


def test_tensorrt_documents_each_operator_with_its_types(exported):
    model = onnx.load(exported.onnx)
    assert list(refusals(model)) == []
    later = convert_opset(model, 20)
    assert {line.partition(": ")[2] for line in refusals(later)} == {
        "GridSample by b'linear' of [4, 4]"
    }
    convert_to_half(model)
    assert list(refusals(model)) == []
    node = next(node for node in model.graph.node if node.op_type == "TopK")
    node.input[1] = "many"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([3840]), "many"))
    assert list(refusals(model)) == [f"{node.name}: TopK of 3840, sorted: 1"]


def test_constants_stay_within_16_bits():
    values = np.array([1e6, -np.inf, 0.1], np.float32)
    found = onnx.numpy_helper.to_array(half_tensor(onnx.numpy_helper.from_array(values), "a"))
    assert found.tolist() == [65504, -65504, np.float16(0.1)]


def with_onnxsim(model, folder):
    simplified, is_valid = pytest.importorskip("onnxsim").simplify(model)
    assert is_valid
    return simplified


def with_onnxslim(model, folder):
    return pytest.importorskip("onnxslim").slim(model)


def with_version_converter(model, folder):
    return onnx.version_converter.convert_version(model, 17)


def with_symbolic_shapes(model, folder):
    """As it is done before a quantisation; it gives up where it cannot tell a shape."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    onnx.save(model, folder / "given.onnx")
    quant_pre_process(folder / "given.onnx", folder / "prepared.onnx")
    return onnx.load(folder / "prepared.onnx")


@pytest.mark.parametrize(
    "convert", [with_onnxsim, with_onnxslim, with_version_converter, with_symbolic_shapes]
)
def test_converters_that_keep_the_numbers_take_the_file(exported, convert, tmp_path):
    onnx.save(convert(onnx.load(exported.onnx), tmp_path), tmp_path / "other.onnx")
    found, _ = run_both(exported, tmp_path / "other.onnx")
    assert max(found) < 1e-5


def with_onnxconverter(model, folder):
    float16 = pytest.importorskip("onnxconverter_common.float16")
    return float16.convert_float_to_float16(model, keep_io_types=True)


def with_onnxruntime(model, folder):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(model, keep_io_types=True)


def with_8_bits(model, folder):
    from onnxruntime.quantization import quantize_dynamic

    onnx.save(model, folder / "given.onnx")
    quantize_dynamic(folder / "given.onnx", folder / "quantized.onnx")
    return onnx.load(folder / "quantized.onnx")


@pytest.mark.parametrize(
    ("convert", "limit"),
    [(with_onnxconverter, 5e-3), (with_onnxruntime, 5e-3), (with_8_bits, 5e-2)],
)
def test_converters_to_fewer_bits_take_the_file(exported, convert, limit, tmp_path):
    """Scores differ by rounding; that may put another proposal first."""
    onnx.save(convert(onnx.load(exported.onnx), tmp_path), tmp_path / "other.onnx")
    found, _ = run_both(exported, tmp_path / "other.onnx", check.Limits(1.0, 1.0, 1.0))
    assert 1e-6 < found.scores < limit


def test_the_file_names_no_folder_of_this_machine(exported):
    assert str(ROOT).encode() not in exported.onnx.read_bytes()


def test_program_keeps_the_native_operators_and_gives_the_same(exported):
    targets = {str(node.target) for node in exported.program.graph.nodes}
    assert {
        "lite_detr.fused_ms_deform_attn.default",
        "lite_detr.fused_key_aware_ms_deform_attn.default",
    } <= targets
    program, expected = exported.program.module(), check.run_detector(exported.detector)
    batches = check.sample_batches(exported.detector)
    found = check.check_batches(
        lambda *batch: check.split_batch(*program(*batch)), expected, batches
    )
    assert max(found) < 1e-6


@pytest.mark.slow
def test_package_of_aotinductor_gives_the_same(exported, tmp_path):
    path = tmp_path / "detector.pt2"
    compile_program(exported.program, path)
    batches = check.sample_batches(exported.detector)
    expected = check.run_detector(exported.detector)
    assert max(check.check_batches(check.run_package(path), expected, batches)) < 1e-5


def test_demo_detects_what_the_detector_does(exported, images):
    detector = onnx_demo.OnnxDetector(str(exported.onnx))
    mapper = instantiate(exported.cfg.dataloader.test.mapper)
    for path in sorted(images.iterdir()):
        found = detector(onnx_demo.read(path))
        with torch.no_grad():
            output = exported.detector([mapper({"file_name": str(path)})])[0]["instances"]
        assert len(found.scores) == len(output) > 20
        boxes = torch.from_numpy(found.boxes)
        torch.testing.assert_close(boxes, output.pred_boxes.tensor, atol=1e-3, rtol=0)
        torch.testing.assert_close(torch.from_numpy(found.scores), output.scores, atol=1e-4, rtol=0)
        assert found.classes.tolist() == output.pred_classes.tolist()


def test_demo_runs_without_torch(exported, images, tmp_path):
    (images / "broken.png").write_text("broken")
    output, record = tmp_path / "out", tmp_path / "out" / "found.json"
    blocked = ("cv2", "detectron2", "lite_detr", "onnx", "torch", "torchvision")
    program = (
        "import runpy, sys; "
        f"sys.modules.update(dict.fromkeys({blocked})); "
        f"runpy.run_path({str(ROOT / 'demo' / 'onnx_demo.py')!r}, run_name='__main__')"
    )
    arguments = ["--model", exported.onnx, "--input", images, "--output", output]
    arguments += ["--json", record, "--confidence-threshold", "0"]
    run = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stderr
    assert run.stdout.startswith("images: 3, detections: ")
    assert run.stdout.endswith(f"pictures are in {output}, detections are in {record}\n")
    assert f"{images / 'broken.png'}: skipped: " in run.stderr
    entries = {Path(entry["file_name"]).name: entry for entry in json.loads(record.read_text())}
    assert entries["broken.png"]["problem"]
    assert [entries["c.jpg"][side] for side in ("width", "height")] == [60, 90]
    assert entries["a.png"]["detections"][0]["class"] in "0123456789"
    for name in ("a", "c"):
        with Image.open(output / f"{name}.png") as picture:
            assert picture.size == (60, 90)
            drawn = np.asarray(picture)
        original = np.asarray(onnx_demo.read(next(images.glob(f"{name}.*"))))
        assert (drawn != original).any()
