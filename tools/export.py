#!/usr/bin/env python
"""Export a trained detector to a file that runs without its config, and check the file.

    export.py --config-file digits/lite_dino_efficientnet_lite0.py \\
        --weights output/demo/model_final.pth --format onnx --output output/demo/detector.onnx

Options follow as key=value. Batch, height and width stay open. docs/deploy.md says what each format
needs, takes and gives. Once it is written, the file runs on a few small images of noise beside the
detector; the exit status is 1 if their detections differ by more than rounding.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.config import instantiate
from omegaconf import DictConfig

from lite_detr.checkpoint import DetrCheckpointer, WeightsError
from lite_detr.data.coco import DatasetError, apply_data_config
from lite_detr.export import (
    ExportError,
    check,
    compile_program,
    export_program,
    export_torchscript,
    metadata,
    save_onnx,
    save_program,
)
from lite_detr.export.check_onnx import OnnxFile, check_onnx
from lite_detr.export.onnx_file import check_packages
from lite_detr.model_zoo import ConfigError
from lite_detr.modeling.detector import Detector
from lite_detr.overrides import load_config


class Format(NamedTuple):
    """How to write a file, how to compare it with the detector, and why it may differ."""

    suffix: str
    write: Callable[[Detector, Path, dict[str, str]], None]
    compare: Callable[[Path, Detector], check.Differences]
    reason: str = (
        "weights that rate many proposals alike, as random ones do, can do more, as rounding then "
        "changes their order; with others the file is wrong"
    )


def compare_with(
    run: Callable[[Path], check.Run], expected: Callable[[Detector], check.Run]
) -> Callable[[Path, Detector], check.Differences]:
    """On images of noise, each by what its function makes of it."""
    return lambda path, model: check.check_batches(
        run(path), expected(model), check.sample_batches(model)
    )


def compare_onnx(path: Path, model: Detector) -> check.Differences:
    """On the same images, in the file's order of proposals."""
    found, reordering = check_onnx(OnnxFile(path), model, check.sample_batches(model))
    if reordering.moved:
        print(
            f"proposals whose logits differ by {reordering.gap:.0e} at most are ranked otherwise, "
            "which the detector is given"
        )
    return found


FORMATS = {
    "onnx": Format(
        ".onnx",
        lambda model, path, facts: save_onnx(export_program(model), path, facts),
        compare_onnx,
        "the file is wrong",
    ),
    "torch-export": Format(
        ".pt2",
        lambda model, path, _: save_program(export_program(model), path),
        compare_with(check.run_program, check.run_detector),
    ),
    "aoti": Format(
        ".pt2",
        lambda model, path, _: compile_program(export_program(model), path),
        compare_with(check.run_package, check.run_detector),
    ),
    "torchscript": Format(
        ".ts",
        lambda model, path, _: export_torchscript(model, path),
        compare_with(check.run_torchscript, check.run_detector_one_by_one),
    ),
}


def load_detector(cfg: DictConfig, weights: str, device: str) -> Detector:
    """The config's detector with weights.

    Raises:
        WeightsError: they cannot be read, do not fit, or are nowhere given.
        ExportError: the model is not one of ours.
    """
    weights = weights or cfg.train.init_checkpoint
    if not weights:
        raise WeightsError("give the weights of a trained detector with --weights FILE")
    model = instantiate(cfg.model).to(device).eval()
    if not isinstance(model, Detector):
        raise ExportError(f"only lite_detr's detectors are exported, the config's model is {model}")
    DetrCheckpointer(model).load(weights)
    return model


def export(args: argparse.Namespace) -> None:
    """Does what the command line asks for.

    Raises:
        ExportError: the format cannot hold the detector, or its file gives other detections.
    """
    kind = FORMATS[args.format]
    facts = {}
    cfg = load_config(args.config_file, args.opts)
    apply_data_config(cfg, splits=("test",))
    if args.format == "onnx":
        # Before minutes go into tracing.
        check_packages("onnx", "onnxscript", "onnxruntime")
        facts = metadata.describe(cfg, args.config_file)
    model = load_detector(cfg, args.weights, args.device)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    kind.write(model, args.output, facts)
    print(f"{args.output}: {args.output.stat().st_size / 2**20:.1f} MiB")
    found = kind.compare(args.output, model)
    text = (
        f"largest differences from the detector: {found.scores:.1e} in scores, {found.boxes:.1e} "
        "of the image's longer side in boxes"
    )
    if max(found) > check.LIMIT:
        raise ExportError(f"{text}; rounding makes less than {check.LIMIT:.0e}: {kind.reason}")
    print(text)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="C", help="a file or a name of the model zoo")
    add("--weights", default="", metavar="FILE", help="of the trained detector")
    add("--format", required=True, choices=FORMATS)
    add("--output", required=True, type=Path, metavar="FILE", help="its folder is made if need be")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="that the file is for; an ONNX file is for any (default: %(default)s)",
    )
    add("opts", nargs="*", metavar="key=value", help="change the config's values")
    args = parser.parse_intermixed_args(argv)
    suffix = FORMATS[args.format].suffix
    if args.output.suffix != suffix:
        parser.error(f"--format {args.format} writes files whose names end in {suffix}")
    if args.device == "cuda" and args.format == "onnx":
        parser.error("--format onnx is traced on the CPU, and its file runs on any device")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and PyTorch finds none")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    try:
        export(parse_arguments(argv))
    except (FileNotFoundError, ConfigError, DatasetError, WeightsError, ExportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
