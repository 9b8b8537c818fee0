"""Export a trained detector to a file that runs without its config, and check the file.

    %(prog)s --config-file digits/lite_dino_efficientnet_lite0.py \\
        --weights output/demo/model_final.pth --format onnx --output output/demo/detector.onnx

Config overrides follow as key=value. Batch, height and width stay open. docs/deploy.md lists the
needs, inputs and outputs of each format. After it is written, the file runs on a few small images
of noise beside the detector; the exit status is 1 if their detections differ by more than rounding.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .. import cli, model_zoo, register
from ..cores import limit_threads
from ..errors import SaveError

# Of the formats in lite_detr.export.formats, with the endings of their files, and of the opsets and
# types in lite_detr.export.onnx_file: these import PyTorch.
SUFFIXES = {
    "onnx": ".onnx",
    "openvino": ".xml",
    "torch-export": ".pt2",
    "aoti": ".pt2",
    "torchscript": ".ts",
}
# Those that are traced on the CPU, and have the options of ONNX files.
OF_ONNX = ("onnx", "openvino")
OPSET, OPSETS = 18, range(16, 24)
DTYPES = ("float32", "float16", "float16-decoder")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    cli.add_config_file(parser)
    add = parser.add_argument
    add("--weights", default="", metavar="FILE", help="weights of the trained detector")
    add("--format", required=True, choices=SUFFIXES)
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
    add(
        "--dtype",
        choices=DTYPES,
        default=DTYPES[0],
        help="of the weights in a file of ONNX or OpenVINO; float16 keeps geometry and scores in "
        "float32, float16-decoder also all that ranks the proposals (default: %(default)s)",
    )
    cli.add_overrides(parser)
    args = parser.parse_intermixed_args(argv)
    suffix = SUFFIXES[args.format]
    if args.output.suffix != suffix:
        parser.error(f"--format {args.format} writes files whose names end in {suffix}")
    if args.device == "cuda" and args.format in OF_ONNX:
        parser.error(
            f"--format {args.format} is traced on the CPU, and its file runs on any device"
        )
    if args.dtype != DTYPES[0] and args.format not in OF_ONNX:
        parser.error(
            f"--dtype {args.dtype} is for --format {' and '.join(OF_ONNX)}; {args.format} files "
            "are float32"
        )
    return args


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


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    model_zoo.get_lazy_config_file(args.config_file)
    check_output(args.output)
    # It imports PyTorch and Detectron2, which takes seconds.
    register()
    limit_threads()
    from ..export.formats import export

    export(
        args.config_file,
        args.weights,
        args.opts,
        args.format,
        args.output,
        device=args.device,
        opset=args.opset,
        dtype=args.dtype,
    )
