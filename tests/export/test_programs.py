"""``lite-detr export``, and every detector in every format."""

import importlib.util
import re
import resource
import shutil

import pytest
import torch
from detectron2.config import instantiate
from small_detectors import CONFIGS, small_config

from lite_detr import cli, inference, model_zoo
from lite_detr.checkpoint import DetrCheckpointer
from lite_detr.commands import export
from lite_detr.export import (
    ExportError,
    check,
    compile_program,
    export_program,
    export_torchscript,
    formats,
    onnx_file,
    onnx_metadata,
    program,
    save_onnx,
)
from lite_detr.export.check import OnnxFile, check_onnx
from lite_detr.modeling import DeformableEncoder

TINY = "tests/helpers/configs/tiny.py"
LIMIT = check.FLOAT_LIMITS.scores
ENCODERS, ATTENTIONS = ("full", "lite"), ("MultiScale", "KeyAware")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of the tiny config, a file."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    detector = instantiate(model_zoo.get_config(TINY).model)
    DetrCheckpointer(detector, str(folder)).save("tiny")
    return folder / "tiny.pth"


def arguments(weights, output, kind, *more):
    given = ["--config-file", TINY, "--weights", weights, "--format", kind, "--output", output]
    return [str(text) for text in (*given, *more)]


def test_torchscript_is_written_and_checked(weights, tmp_path, capsys):
    output = tmp_path / "new" / "tiny.ts"
    export.main(arguments(weights, output, "torchscript", "model.detections_per_image=7"))
    printed = capsys.readouterr().out
    assert f"{output}: " in printed and "largest differences from the detector: " in printed
    boxes, classes, scores, size = torch.jit.load(output)(torch.rand(3, 97, 131) * 255)
    assert boxes.shape[1:] == (4,) and len(boxes) == len(classes) == len(scores) <= 7
    assert size.tolist() == [97, 131]


def test_file_that_differs_from_the_detector_is_an_error(weights, tmp_path, monkeypatch, capsys):
    """Written and run by stand-ins: the detector itself, with scores that are 2e-4 higher."""
    written = []

    def write(model, path, *_):
        written.append(check.run_detector_one_by_one(model))
        path.touch()

    def run(images, sizes):
        for found in written[0](images, sizes):
            yield found._replace(scores=found.scores + 2e-4)

    compare = formats.compare_with(lambda path: run, check.run_detector_one_by_one)
    other = formats.FORMATS["torchscript"]._replace(write=write, compare=compare)
    monkeypatch.setitem(formats.FORMATS, "torchscript", other)
    with pytest.raises(SystemExit):
        export.main(arguments(weights, tmp_path / "tiny.ts", "torchscript"))
    error = capsys.readouterr().err
    assert re.search("2.0e-04 in scores, .* rounding makes less than 1e-04", error)


def test_the_command_knows_what_can_be_written_without_pytorch():
    assert list(export.SUFFIXES) == list(formats.FORMATS)
    assert (export.OPSET, export.OPSETS) == (onnx_file.OPSET, onnx_file.OPSETS)
    assert export.DTYPES == onnx_file.DTYPES == tuple(check.LIMITS)
    assert list(cli.DTYPES) == list(inference.DTYPES)


@pytest.mark.parametrize(
    ("kind", "name", "more", "message"),
    [
        ("onnx", "a.pt2", (), "--format onnx writes files whose names end in .onnx"),
        ("aoti", "a.so", (), "--format aoti writes files whose names end in .pt2"),
        ("caffe2", "a.pb", (), "invalid choice: 'caffe2'"),
        ("onnx", "a.onnx", ("--device", "cuda"), "its file runs on any device"),
    ],
)
def test_bad_arguments(kind, name, more, message, capsys):
    with pytest.raises(SystemExit):
        export.main(arguments("w.pth", name, kind, *more))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--weights", "absent.pth"), "error: weights absent.pth: there is no such file"),
        (("--weights", ""), "names no weights: give those of a trained detector"),
        (("model.num_clases=3",), "model.num_clases"),
        (("dataloader.test_aug.enabled=True",), "evaluation and prediction, not for export"),
        (("--config-file", "absent.py"), "error: config 'absent.py' is neither a file nor"),
    ],
)
def test_errors_are_one_line(weights, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as exit_info:
        export.main(arguments(weights, tmp_path / "tiny.ts", "torchscript", *more))
    assert exit_info.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and message in line


@pytest.fixture
def untraced(monkeypatch):
    """It is an error to begin the work that takes minutes."""

    def write(*_):
        raise AssertionError("a detector was traced")

    for kind, found in formats.FORMATS.items():
        monkeypatch.setitem(formats.FORMATS, kind, found._replace(write=write))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/tiny.ts", "cannot be written: "),
        ("folder.ts", "folder.ts is a folder; give the name of a file"),
        (f"{'n' * 252}.ts", "cannot be written: "),
        ("/proc/tiny.ts", "/proc/tiny.ts cannot be written: "),
    ],
)
def test_a_file_that_cannot_be_written_is_named_first(untraced, tmp_path, capsys, name, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder.ts").mkdir()
    with pytest.raises(SystemExit) as exit_info:
        export.main(arguments("absent.pth", tmp_path / name, "torchscript"))
    assert exit_info.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_disk_without_room_is_found_before_tracing(
    untraced, weights, tmp_path, capsys, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(formats.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit):
        export.main(arguments(weights, tmp_path / "tiny.ts", "torchscript"))
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"error: .*tiny.ts needs \d+ MiB, and the disk has 1 MiB left", line)
    assert not (tmp_path / "tiny.ts").exists()


def test_a_disk_that_fills_up_leaves_the_earlier_file(weights, tmp_path, capsys):
    """By a limit on the size of files, of which the system tells in the same way."""
    output = tmp_path / "tiny.ts"
    output.write_text("an earlier file")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(SystemExit):
            export.main(arguments(weights, output, "torchscript"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {output} cannot be written: ") and "File too large" in line
    assert output.read_text() == "an earlier file"
    assert list(tmp_path.iterdir()) == [output]


def test_weights_that_cannot_be_downloaded_are_one_line(untraced, tmp_path, capsys):
    """From a port of this machine on which nothing listens."""
    url = "http://127.0.0.1:9/model_final.pth"
    with pytest.raises(SystemExit) as exit_info:
        export.main(arguments(url, tmp_path / "tiny.ts", "torchscript"))
    assert exit_info.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and url in line and "cannot be downloaded" in line


def test_missing_packages_are_named_with_the_extra(weights, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name)
    )
    with pytest.raises(SystemExit):
        export.main(arguments(weights, tmp_path / "tiny.onnx", "onnx"))
    assert "onnx and onnxscript and onnxruntime, which are not" in capsys.readouterr().err
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    with pytest.raises(ExportError, match=r"onnxruntime, which is not .*'lite-detr\[export\]'"):
        onnx_file.check_packages("onnxruntime")


def test_without_native_operators_or_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(program.shutil, "which", lambda name: None)
    with pytest.raises(ExportError, match="there is no g"):
        compile_program(None, tmp_path / "a.pt2")
    monkeypatch.setattr(program.native, "DEVICES", ())
    monkeypatch.setattr(program.native, "MISSING_REASON", "built for another PyTorch")
    detector = instantiate(small_config("h_detr"))
    for write in (export_program, lambda detector: export_torchscript(detector, tmp_path / "a.ts")):
        with pytest.raises(ExportError, match="none for cpu .built for another PyTorch.: docs/ker"):
            write(detector)


def test_metadata_refuses_what_it_cannot_say():
    cfg = model_zoo.get_config("digits/lite_dino_efficientnet_lite0.py")
    metadata = onnx_metadata(cfg, "name")
    assert metadata["preprocessing"] == (
        '{"channels": "RGB", "resize": {"short_side": 256, "max_size": 320}}'
    )
    cfg.model.num_classes = 3
    assert onnx_metadata(cfg, "name")["class_names"] == "[]"
    mapper = cfg.dataloader.test.mapper
    [resize] = mapper.augmentations
    mapper.augmentations = []
    assert '"resize": null' in onnx_metadata(cfg, "name")["preprocessing"]
    mapper.augmentations = [resize, resize]
    with pytest.raises(ExportError, match="holds ResizeShortestEdge, ResizeShortestEdge; an ONNX"):
        onnx_metadata(cfg, "name")
    mapper.augmentations = [resize]
    mapper.augmentations[0].short_edge_length = (200, 240)
    with pytest.raises(ExportError, match="one bilinear ResizeShortestEdge of one length"):
        onnx_metadata(cfg, "name")
    mapper.image_format = "L"
    with pytest.raises(ExportError, match="image_format is L; .* RGB or BGR"):
        onnx_metadata(cfg, "name")


def test_compare_finds_another_score_box_class_and_number():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 30], [0, 0, 5, 5]])
    one = check.Detections(boxes, torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0, 1, 0]))
    assert check.compare(one, one, 100) == (0, 0)
    other = one._replace(scores=one.scores + torch.tensor([0, 0.01, 0]))
    assert check.compare(one, other, 100).scores == pytest.approx(0.01)
    moved = one._replace(boxes=boxes + torch.tensor([[0.0], [2], [0]]))
    assert check.compare(one, moved, 100).boxes == pytest.approx(0.02)
    named = one._replace(classes=torch.tensor([0, 2, 0]))
    assert check.compare(one, named, 100).boxes == float("inf")
    fewer = check.Detections(*(values[:2] for values in one))
    assert check.compare(one, fewer, 100) == (float("inf"), float("inf"))
    # Whether the last is among them may hang on a digit.
    last = one._replace(classes=torch.tensor([0, 1, 4]))
    assert check.compare(one, last, 100).boxes == 0


def variant(name, encoder, attention):
    cfg = small_config(name)
    if encoder == "full":
        cfg.encoder = dict(_target_=DeformableEncoder, layer=cfg.encoder.layer, num_layers=1)
    cfg.encoder.layer.attention._target_ = f"lite_detr.modeling.{attention}DeformableAttention"
    torch.manual_seed(0)
    detector = instantiate(cfg)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return detector


def largest_onnx_difference(detector, path):
    save_onnx(export_program(detector), path, {})
    found, _ = check_onnx(OnnxFile(path), detector, check.sample_batches(detector))
    return max(found)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_detector_in_onnx(name, encoder, attention, tmp_path):
    detector = variant(name, encoder, attention)
    assert largest_onnx_difference(detector, tmp_path / "detector.onnx") < LIMIT


@pytest.mark.slow
def test_single_stage_in_onnx(tmp_path):
    cfg = small_config("deformable_detr")
    single = "deformable_detr/deformable_detr_r50_single_stage_50ep.py"
    single = model_zoo.get_config(single).model
    cfg.queries, cfg.decoder = single.queries, single.decoder
    cfg.queries.num_queries, cfg.decoder.heads.num_layers = 10, 2
    torch.manual_seed(0)
    assert largest_onnx_difference(instantiate(cfg), tmp_path / "a.onnx") < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [("onnx", ()), ("onnx", ("--dtype", "float16")), ("torch-export", ()), ("aoti", ())],
)
def test_a_resnet_from_the_command_line(kind, options, weights, tmp_path):
    pytest.importorskip("onnxruntime")
    suffix = export.SUFFIXES[kind]
    export.main(arguments(weights, tmp_path / f"tiny{suffix}", kind, *options))


@pytest.mark.slow
def test_an_efficientnet_in_onnx(tmp_path):
    cfg = model_zoo.get_config("digits/lite_dino_efficientnet_lite0.py")
    cfg.model.decoder.heads.num_layers = 1
    torch.manual_seed(0)
    assert largest_onnx_difference(instantiate(cfg.model), tmp_path / "a.onnx") < LIMIT
