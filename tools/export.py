#!/usr/bin/env python
"""Export a trained detector to a file that runs without its config, and check the file.

    export.py --config-file digits/lite_dino_efficientnet_lite0.py \\
        --weights output/demo/model_final.pth --format onnx --output output/demo/detector.onnx

Config overrides follow as key=value. Batch, height and width stay open. docs/deploy.md lists the
needs, inputs and outputs of each format. After it is written, the file runs on a few small images
of noise beside the detector; the exit status is 1 if their detections differ by more than rounding.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from lite_detr import cli
from lite_detr.errors import ExportError, SaveError
from lite_detr.export import (
    check,
    compile_program,
    export_program,
    export_torchscript,
    onnx_metadata,
    save_onnx,
    save_program,
)
from lite_detr.export.onnx_file import OPSET, OPSETS, check_packages
from lite_detr.inference.predictor import build_trained_model, load_trained_config
from lite_detr.modeling.detector import Detector


class Format(NamedTuple):
    """The functions that write a file and compare it, and the reason why it may differ."""

    suffix: str
    write: Callable[[Detector, Path, argparse.Namespace, dict[str, str]], None]
    compare: Callable[[Path, Detector], check.Differences]
    reason: str = (
        "weights that rate many proposals alike, as random ones do, can cause more, as rounding "
        "then changes their order; with other weights, the file is wrong"
    )


def compare_with(
    run: Callable[[Path], check.Run], expected: Callable[[Detector], check.Run]
) -> Callable[[Path, Detector], check.Differences]:
    """Return a comparison of two functions, one of the file and one of the detector, on noise."""
    return lambda path, model: check.check_batches(
        run(path), expected(model), check.sample_batches(model)
    )


def compare_onnx(path: Path, model: Detector) -> check.Differences:
    """Compare on the same noise, with the detector's proposals in the file's order."""
    found, reordering = check.check_onnx(check.OnnxFile(path), model, check.sample_batches(model))
    if reordering.moved:
        print(
            "the file ranks some proposals differently, whose logits differ by at most "
            f"{reordering.gap:.0e}; the detector is compared in the file's order"
        )
    return found


FORMATS = {
    "onnx": Format(
        ".onnx",
        lambda model, path, args, metadata: save_onnx(
            export_program(model), path, metadata, args.opset
        ),
        compare_onnx,
        "the file is wrong",
    ),
    "torch-export": Format(
        ".pt2",
        lambda model, path, *_: save_program(export_program(model), path),
        compare_with(check.run_program, check.run_detector),
    ),
    "aoti": Format(
        ".pt2",
        lambda model, path, *_: compile_program(export_program(model), path),
        compare_with(check.run_package, check.run_detector),
    ),
    "torchscript": Format(
        ".ts",
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


def check_output(path: Path) -> None:
    """Check that a file can be written, before minutes of work.

    Raises:
        SaveError: it cannot.
    """
    if path.is_dir():
        raise SaveError(f"{path} is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The name is a little longer than that of the file, as it is while the file is written.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name):
            pass
    except OSError as error:
        raise SaveError(f"{path} cannot be written: {error}") from error


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


def export(args: argparse.Namespace) -> None:
    """Write and check the file of the command line.

    Raises:
        ExportError: the format cannot hold the detector, or its file has other detections.
        SaveError: the file cannot be written.
    """
    check_output(args.output)
    kind = FORMATS[args.format]
    cfg = load_trained_config(args.config_file, args.weights, args.opts)
    cfg.train.device = args.device
    if args.format == "onnx":
        # Before minutes of tracing.
        check_packages("onnx", "onnxscript", "onnxruntime")
    model = build_detector(cfg)
    metadata = {}
    if args.format == "onnx":
        metadata = onnx_metadata(cfg, args.config_file, model.class_names)
    check_space(args.output, model)
    kind.write(model, args.output, args, metadata)
    print(f"{args.output}: {args.output.stat().st_size / 2**20:.1f} MiB")
    found = kind.compare(args.output, model)
    text = (
        f"largest differences from the detector: {found.scores:.1e} in scores, {found.boxes:.1e} "
        "of the image's longer side in boxes"
    )
    if max(found) > check.LIMIT:
        raise ExportError(f"{text}; rounding makes less than {check.LIMIT:.0e}: {kind.reason}")
    print(text)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    cli.add_config_file(parser)
    add = parser.add_argument
    add("--weights", default="", metavar="FILE", help="weights of the trained detector")
    add("--format", required=True, choices=FORMATS)
    add("--output", required=True, type=Path, metavar="FILE", help="its folder is created")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="the device to export for; an ONNX file runs on any (default: %(default)s)",
    )
    add(
        "--opset",
        type=int,
        choices=OPSETS,
        default=OPSET,
        help="of an ONNX file: the version of its operators (default: %(default)s)",
    )
    cli.add_overrides(parser)
    args = parser.parse_intermixed_args(argv)
    suffix = FORMATS[args.format].suffix
    if args.output.suffix != suffix:
        parser.error(f"--format {args.format} writes files whose names end in {suffix}")
    if args.device == "cuda" and args.format == "onnx":
        parser.error("--format onnx is traced on the CPU, and its file runs on any device")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and PyTorch finds none")
    return args


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    export(parse_args(argv))


if __name__ == "__main__":
    main()
