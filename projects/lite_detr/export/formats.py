"""The formats that a trained detector is exported to: how each is written, and compared."""

import contextlib
import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from ..errors import ExportError, OptimizationError, SaveError
from ..inference.optimize import fold_backbone_norms
from ..inference.predictor import build_trained_model, load_trained_config
from ..inference.tta import refuse_tta
from ..modeling.detector import Detector
from . import check
from .onnx_file import check_packages, onnx_metadata, save_onnx
from .openvino_file import OpenvinoFile, save_openvino
from .program import compile_program, export_program, export_torchscript, save_program


class Format(NamedTuple):
    """The functions that write a file and compare it, and the reason why it may differ.

    ``packages`` are those that it needs, by our extra that installs them, and ``beside`` the ending
    of the file that comes with it, if one does. With packages goes the metadata of ONNX files.
    """

    write: Callable[[Detector, Path, dict[str, str], int, str], None]
    compare: Callable[[Path, Detector, check.Limits], check.Differences]
    reason: str = (
        "weights that rate many proposals alike, as random ones do, can cause more, as rounding "
        "then changes their order; with other weights, the file is wrong"
    )
    packages: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    beside: str | None = None


def compare_with(
    run: Callable[[Path], check.Run], expected: Callable[[Detector], check.Run]
) -> Callable[[Path, Detector, check.Limits], check.Differences]:
    """Return a comparison of two functions, one of the file and one of the detector, on noise."""
    return lambda path, model, _: check.check_batches(
        run(path), expected(model), check.sample_batches(model)
    )


def write_onnx(
    model: Detector, path: Path, metadata: dict[str, str], opset: int, dtype: str
) -> None:
    """Write an ONNX file; in 16 bits, of a detector whose batch norms are folded.

    Convolutions with the norms in them are rounded once instead of twice, which halves the error.
    """
    if dtype == "float16":
        folded = copy.deepcopy(model)
        # Some backbones have norms that cannot be folded.
        with contextlib.suppress(OptimizationError):
            fold_backbone_norms(folded)
            model = folded
    save_onnx(export_program(model), path, metadata, opset, dtype)


def write_openvino(
    model: Detector, path: Path, metadata: dict[str, str], opset: int, dtype: str
) -> None:
    """Write a model file of OpenVINO, by way of an ONNX file."""
    with tempfile.TemporaryDirectory() as folder:
        onnx_file = Path(folder, "detector.onnx")
        write_onnx(model, onnx_file, metadata, opset, dtype)
        save_openvino(onnx_file, path, metadata)


def compare_file(
    file: check.OnnxFile | OpenvinoFile, model: Detector, limits: check.Limits
) -> check.Differences:
    """Compare on the same noise, with the detector's proposals in the file's order."""
    found, reordering = check.check_onnx(file, model, check.sample_batches(model), limits)
    if reordering.moved:
        print(
            "the file ranks some proposals differently, whose logits differ by at most "
            f"{reordering.gap:.0e}; the detector is compared in the file's order"
        )
    return found


WRONG = "the file is wrong"
OF_ONNX = {"export": ("onnx", "onnxscript", "onnxruntime")}
FORMATS = {
    "onnx": Format(
        write_onnx,
        lambda path, *rest: compare_file(check.OnnxFile(path), *rest),
        WRONG,
        packages=OF_ONNX,
    ),
    "openvino": Format(
        write_openvino,
        lambda path, *rest: compare_file(OpenvinoFile(path), *rest),
        WRONG,
        packages=OF_ONNX | {"openvino": ("openvino",)},
        beside=".bin",
    ),
    "torch-export": Format(
        lambda model, path, *_: save_program(export_program(model), path),
        compare_with(check.run_program, check.run_detector),
    ),
    "aoti": Format(
        lambda model, path, *_: compile_program(export_program(model), path),
        compare_with(check.run_package, check.run_detector),
    ),
    "torchscript": Format(
        lambda model, path, *_: export_torchscript(model, path),
        compare_with(check.run_torchscript, check.run_detector_one_by_one),
    ),
}


def build_detector(cfg: DictConfig) -> Detector:
    """Build the config's detector with its weights.

    Raises:
        WeightsError: they cannot be read or do not fit.
        ExportError: the model is not one of ours.
    """
    model = build_trained_model(cfg)
    if not isinstance(model, Detector):
        raise ExportError(
            f"only lite_detr's detectors are exported, and the config's is {type(model).__name__}"
        )
    return model


def check_space(path: Path, model: Detector) -> None:
    """Check that a disk has room for a model's weights.

    Raises:
        SaveError: it has not.
    """
    needed = sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise SaveError(
            f"{path} needs {needed / 2**20:.0f} MiB, and the disk has {free / 2**20:.0f} MiB left: "
            "make room there"
        )


def export(
    config_file: str,
    weights: str,
    opts: Sequence[str],
    format_name: str,
    output: Path,
    *,
    device: str,
    opset: int,
    dtype: str,
) -> None:
    """Write a trained detector to a file, and compare the file with it.

    Args:
        config_file, weights, opts: see :func:`load_trained_config`.
        format_name: one of ``FORMATS``.
        output: the file; its folder exists.
        device: ``cpu`` or ``cuda``, the device to export for.
        opset: of an ONNX file, or of that which becomes OpenVINO's.
        dtype: of these, see :func:`save_onnx`.

    Raises:
        ExportError: the format cannot hold the detector, its file has other detections, or this
            machine lacks the device.
        SaveError: the file cannot be written.
        ConfigError: the config turns test-time augmentation on.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ExportError("--device cuda needs a GPU, and PyTorch finds none")
    chosen = FORMATS[format_name]
    cfg = load_trained_config(config_file, weights, opts)
    cfg.train.device = device
    refuse_tta(cfg, "export")
    # Before minutes of tracing.
    for extra, packages in chosen.packages.items():
        check_packages(*packages, extra=extra)
    model = build_detector(cfg)
    metadata = {}
    if chosen.packages:
        metadata = onnx_metadata(cfg, config_file, model.class_names)
    check_space(output, model)
    chosen.write(model, output, metadata, opset, dtype)
    files = [output, output.with_suffix(chosen.beside)] if chosen.beside else [output]
    size = sum(file.stat().st_size for file in files)
    print(f"{' and '.join(map(str, files))}: {size / 2**20:.1f} MiB")
    limits = check.LIMITS[dtype]
    found = chosen.compare(output, model, limits)
    text = (
        f"largest differences from the detector: {found.scores:.1e} in scores, {found.boxes:.1e} "
        "of the image's longer side in boxes"
    )
    # A difference may be NaN, which is not below any limit.
    if not (found.scores <= limits.scores and found.boxes <= limits.boxes):
        raise ExportError(
            f"{text}; rounding makes less than {limits.scores:.0e} and {limits.boxes:.0e}: "
            f"{chosen.reason}"
        )
    print(text)
