#!/usr/bin/env python
"""Export detectors to ONNX, and compare size, time and detections with the models' own.

onnx_files.py --config-file dino/dino_r50_4scale_36ep.py dino/lite_dino_r50_h3l1_2p1x3_36ep.py
onnx_files.py --config-file A.py --size 256x320 --markdown docs/deploy.md
onnx_files.py --config-file A.py --weights output/a/model_final.pth --images folder

Weights and image are random unless they are given. The model, with its native operators, and ONNX
Runtime take turns on the first image, with the same number of CPU threads; the ratio is that of the
medians. Detections are compared on all images: as they are, and with the model taking its proposals
in the file's order, as rounding ranks proposals with similar scores.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from calls import add_opts, environment, time_turn
from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import Tensor

from lite_detr import cli
from lite_detr.analysis.markdown_page import page, write_tables
from lite_detr.checkpoint import DetrCheckpointer
from lite_detr.errors import MissingFileError
from lite_detr.export import check, export_program, save_onnx
from lite_detr.export.check import OnnxFile, Reordering, check_onnx
from lite_detr.overrides import load_config

HEADER = (
    "| config | ONNX file, MiB | ONNX Runtime's time / the model's | largest difference in scores "
    "| in the file's order | in boxes, of the longer side | proposals ranked otherwise "
    "| their logits differ by |\n|---|---|---|---|---|---|---|---|"
)


class Row(NamedTuple):
    """The results of a config.

    Attributes:
        size: of the file, in bytes.
        seconds: medians of the model and of ONNX Runtime.
        own: differences between their detections, each with its own order of proposals.
        differences: between their detections, both in the file's order.
        reordering: of the proposals.
    """

    config: str
    size: int
    seconds: tuple[float, float]
    own: check.Differences
    differences: check.Differences
    reordering: Reordering

    def text(self) -> str:
        (model, runtime), found = self.seconds, self.differences
        return (
            f"| `{self.config}` | {self.size / 2**20:.0f} | {runtime / model:.2f} "
            f"| {self.own.scores:.0e} | {found.scores:.0e} | {found.boxes:.0e} "
            f"| {self.reordering.moved} | {self.reordering.gap:.0e} |"
        )


@torch.no_grad()
def measure(config: str, args: argparse.Namespace) -> Row:
    """Export a config's detector and compare it with its file.

    Raises:
        MissingFileError, ConfigError: see :func:`lite_detr.overrides.load_config`; or there are no
            images.
        WeightsError: see :class:`lite_detr.checkpoint.DetrCheckpointer`.
        ExportError: it cannot be exported, or ranks proposals otherwise.
    """
    torch.manual_seed(0)
    cfg = load_config(config, args.opts)
    detector = instantiate(cfg.model).eval()
    if args.weights:
        DetrCheckpointer(detector).load(args.weights)
    images = read_images(args.images, cfg) if args.images else [noise(args.size)]
    batches = [(image[None], torch.tensor([image.shape[1:]])) for image in images]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "detector.onnx")
        save_onnx(export_program(detector), path, {})
        size, file = path.stat().st_size, OnnxFile(path, args.threads)
    differences, reordering = check_onnx(file, detector, batches)
    own = check.check_batches(
        lambda *batch: file.run(*batch)[0], check.run_detector(detector), batches
    )
    turns = [lambda: detector([{"image": images[0]}]), lambda: file.run(*batches[0])]
    taken = [
        [seconds for turn in turns for seconds in time_turn(turn, "cpu")]
        for _ in range(args.rounds)
    ]
    model, runtime = map(statistics.median, zip(*taken))
    print(f"{config}: {model:.3f} s, ONNX Runtime {runtime:.3f} s", flush=True)
    return Row(config, size, (model, runtime), own, differences, reordering)


def noise(size: tuple[int, int]) -> Tensor:
    """Return a random image, ``[3, *size]``."""
    return torch.randint(0, 256, (3, *size)).float()


def read_images(folder: Path, cfg: DictConfig) -> list[Tensor]:
    """Return a folder's readable images, ``[3, H, W]``, resized as the config's test set is."""
    read = instantiate(cfg.dataloader.test.mapper)
    samples = [read({"file_name": str(path)}) for path in sorted(folder.iterdir())]
    images = [sample["image"].float() for sample in samples if "unusable" not in sample]
    if not images:
        raise MissingFileError(f"{folder} holds no image that can be read")
    return images


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add what exported detectors run with, and where their table goes."""
    add, positive = parser.add_argument, cli.whole_number(1)
    add("--weights", default="", metavar="FILE", help="of a trained detector, for all configs")
    add("--size", type=cli.size, default=(800, 1066), metavar="HxW", help="px, of the noise")
    add("--threads", type=positive, default=torch.get_num_threads(), help="of the CPU")
    add("--rounds", type=positive, default=5, help="turns of each")
    add("--markdown", type=page, metavar="FILE.md", help="rewrite the table of this page")
    add_opts(parser)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--config-file", required=True, nargs="+", metavar="C", help="files or names of the zoo")
    add("--images", type=Path, metavar="FOLDER", help="instead of an image of noise")
    add_run_options(parser)
    return parser.parse_args(argv)


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = [measure(config, args) for config in args.config_file]
    table = "\n".join([HEADER, *(row.text() for row in rows)])
    where = environment("cpu")
    height, width = args.size
    images = f"Images of {args.images.name}" if args.images else f"An image of {height}x{width}"
    text = (
        f"{table}\n\n{images}, threads {args.threads}, medians of {args.rounds} turns; "
        f"{where['cpu']}, PyTorch {where['torch']}, ONNX Runtime {version('onnxruntime')}."
    )
    print(f"\n{text}")
    if args.markdown:
        write_tables(args.markdown, text)


if __name__ == "__main__":
    main()
