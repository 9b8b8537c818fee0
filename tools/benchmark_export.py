#!/usr/bin/env python
"""Export detectors to ONNX, and compare size, time and detections with the models' own.

benchmark_export.py --config-file dino/dino_r50_4scale_36ep.py dino/lite_dino_r50_h3l1_2p1x3_36ep.py
benchmark_export.py --config-file A.py --size 256x320 --markdown docs/deploy.md

Weights and image are random. The model, with its native operators, and ONNX Runtime take turns on
one image, on the same number of threads of the CPU; the ratio is that of the medians.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.config import instantiate
from markdown_page import replace_tables
from measure_calls import environment, time_turn
from size_argument import parse_size

from lite_detr.export import ExportError, check, export_program, save_onnx
from lite_detr.model_zoo import ConfigError
from lite_detr.overrides import load_config

HEADER = (
    "| config | ONNX file, MiB | ONNX Runtime's time / the model's | largest difference in scores "
    "| in boxes, of the longer side |\n|---|---|---|---|---|"
)


class Row(NamedTuple):
    """What became of a config.

    Attributes:
        size: of the file, in bytes.
        seconds: of the model and of ONNX Runtime, medians.
        differences: between their detections.
    """

    config: str
    size: int
    seconds: tuple[float, float]
    differences: check.Differences

    def text(self) -> str:
        model, runtime = self.seconds
        return (
            f"| `{self.config}` | {self.size / 2**20:.0f} | {runtime / model:.2f} "
            f"| {self.differences.scores:.0e} | {self.differences.boxes:.0e} |"
        )


@torch.no_grad()
def measure(config: str, args: argparse.Namespace) -> Row:
    """Exports a config's detector and compares it with its file.

    Raises:
        FileNotFoundError, ConfigError: see :func:`lite_detr.overrides.load_config`.
        ExportError: it cannot be exported.
    """
    torch.manual_seed(0)
    detector = instantiate(load_config(config, args.opts).model).eval()
    image = torch.randint(0, 256, (3, *args.size)).float()
    batch = image[None], torch.tensor([args.size])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "detector.onnx")
        save_onnx(export_program(detector), path, {})
        size, run = path.stat().st_size, check.run_onnx(path, args.threads)
    differences = check.check_batches(run, check.run_detector(detector), [batch])
    turns = [lambda: detector([{"image": image}]), lambda: list(run(*batch))]
    taken = [
        [seconds for turn in turns for seconds in time_turn(turn, "cpu")]
        for _ in range(args.rounds)
    ]
    model, runtime = map(statistics.median, zip(*taken))
    print(f"{config}: {model:.3f} s, ONNX Runtime {runtime:.3f} s", flush=True)
    return Row(config, size, (model, runtime), differences)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, nargs="+", metavar="C", help="files or names of the zoo")
    add("--size", type=parse_size, default=(800, 1066), metavar="HxW", help="px")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--rounds", type=int, default=5, help="turns of each")
    add("--markdown", type=Path, metavar="FILE.md", help="put the table between the page's markers")
    add("--opts", nargs="+", default=[], metavar="key=value", help="change the configs' values")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads take numbers from 1 on")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    try:
        rows = [measure(config, args) for config in args.config_file]
    except (FileNotFoundError, ConfigError, ExportError) as error:
        sys.exit(f"error: {error}")
    table = "\n".join([HEADER, *(row.text() for row in rows)])
    where = environment("cpu")
    height, width = args.size
    text = (
        f"{table}\n\nOne image of {height}x{width} pixels, {args.threads} threads, medians of "
        f"{args.rounds} turns; {where['cpu']}, PyTorch {where['torch']}, ONNX Runtime "
        f"{version('onnxruntime')}."
    )
    print(f"\n{text}")
    if args.markdown:
        args.markdown.write_text(replace_tables(args.markdown.read_text(), text))


if __name__ == "__main__":
    main()
