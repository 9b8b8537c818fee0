#!/usr/bin/env python
"""Run a detector in every runtime, and compare size, time, detections and AP in one table.

runtimes.py --config-file digits/lite_dino_efficientnet_lite0.py --weights W.pth --evaluate
runtimes.py --config-file dino/lite_dino_r50_h3l1_2p1x3_36ep.py --size 800x1066 --busy 2

With --evaluate, the images are those of the config's test set, and AP is measured on it; otherwise
there is one image of noise. Without --weights they are random, and spread so that scores differ and
no layer is silent. The model, with its native operators, and all runtimes take turns on the first
image, on the same number of CPU threads; a ratio is that of medians. CPU time is about what an idle
machine would take on one thread. With --busy N they do so again beside N processes that keep a core
busy each.

Detections are compared with the model's one by one: each that scores --least-score or more, in
either set, with its counterpart of the same class in the other. This is done as they are, and then
with the model's proposals in the runtime's order, as a proposal's rank changes what becomes of it.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import onnx
import torch
from calls import environment
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from onnx_files import add_run_options, noise
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from lite_detr import cli
from lite_detr.analysis.markdown_page import write_tables
from lite_detr.checkpoint import DetrCheckpointer
from lite_detr.engine.training import evaluate
from lite_detr.export import check, export_program, save_onnx, save_program
from lite_detr.export.check import OnnxFile, ProposalOrder
from lite_detr.export.formats import write_onnx
from lite_detr.export.onnx_file import OPSET
from lite_detr.export.onnx_half import convert_to_half
from lite_detr.export.openvino_file import OpenvinoFile, save_openvino
from lite_detr.modeling.detector import Detector
from lite_detr.modeling.postprocessing import Detections
from lite_detr.modeling.queries import ProposalQueries
from lite_detr.overrides import load_config

# Images and sizes -> detections, and the order of the proposals if it is known.
Run = Callable[[Tensor, Tensor], tuple[list[Detections], Tensor | None]]
# Counterparts are chosen by their differences in units of these.
SCORE, PIXELS = 1e-2, 0.5

ONNX, ONNX_16, DECODER_16 = "onnx.onnx", "onnx_16.onnx", "decoder_16.onnx"
OPENVINO, PROGRAM = "openvino.xml", "program.pt2"


def load_onnx(path: Path, threads: int) -> Run:
    return OnnxFile(path, threads).run


def load_openvino(precision: str) -> Callable[[Path, int], Run]:
    return lambda path, threads: OpenvinoFile(path, threads, precision).run


def load_program(path: Path, threads: int) -> Run:
    run = check.run_program(path)
    return lambda *batch: (list(run(*batch)), None)


RUNTIMES = {
    "ONNX Runtime": (ONNX, load_onnx),
    "ONNX Runtime, `--dtype float16-decoder`": (DECODER_16, load_onnx),
    "ONNX Runtime, `--dtype float16`": (ONNX_16, load_onnx),
    "OpenVINO, f32": (OPENVINO, load_openvino("f32")),
    "OpenVINO, bf16": (OPENVINO, load_openvino("bf16")),
    "OpenVINO, f16": (OPENVINO, load_openvino("f16")),
    "`torch-export`": (PROGRAM, load_program),
}


class Differences(NamedTuple):
    """The largest differences of detections from their counterparts.

    Attributes:
        scores: in 0 to 1.
        pixels: of a box's corner; infinite if a detection has no counterpart.
        missed: the number of the model's that differ by more than ``SCORE`` or ``PIXELS``.
    """

    scores: float = 0.0
    pixels: float = 0.0
    missed: int = 0

    def join(self, other: "Differences") -> "Differences":
        return Differences(
            max(self.scores, other.scores),
            max(self.pixels, other.pixels),
            self.missed + other.missed,
        )


def compare(expected: Detections, found: Detections, least_score: float) -> Differences:
    """Compare the detections of one image with their counterparts.

    Each of one set that scores enough has one in the other, of its class: those are chosen whose
    differences are smallest in all. One that scores less than the other set's last may be beyond
    what that holds, and does not count.
    """
    result = Differences()
    for one, other in ((found, expected), (expected, found)):
        least = max(least_score, other.scores[-1].item() + SCORE)
        for number in one.classes[one.scores >= least].unique():
            mine = (one.classes == number) & (one.scores >= least)
            theirs = other.classes == number
            if mine.sum() > theirs.sum():
                return Differences(1.0, float("inf"), int(mine.sum()))
            scores = (one.scores[mine][:, None] - other.scores[theirs]).abs()
            pixels = (one.boxes[mine][:, None] - other.boxes[theirs]).abs().amax(-1)
            chosen = linear_sum_assignment(scores / SCORE + pixels / PIXELS)
            scores, pixels = scores[chosen], pixels[chosen]
            missed = int(((scores > SCORE) | (pixels > PIXELS)).sum()) if one is expected else 0
            result = result.join(Differences(scores.max().item(), pixels.max().item(), missed))
    return result


class Row(NamedTuple):
    """The results of a runtime.

    Attributes:
        size: of its file, in bytes.
        seconds: medians of those that pass, of the CPU's, and of those beside busy processes.
        own: differences from the model's detections.
        ordered: differences, with the model's proposals in the runtime's order.
        moved: the mean number of ranks with another proposal.
    """

    name: str
    size: int | None
    seconds: list[float]
    ap: float | None
    own: Differences
    ordered: Differences
    moved: float

    def text(self, reference: "Row", total: int) -> str:
        cells = [self.name, f"{self.size / 2**20:.1f}" if self.size else "–"]
        cells += [f"{one / other:.2f}" for one, other in zip(self.seconds, reference.seconds)]
        cells += [f"{self.ap:.2f}"] if self.ap is not None else []
        for found in (self.own, self.ordered):
            cells += [f"{found.scores:.0e}", f"{found.pixels:.2g}"]
        cells += [f"{self.own.missed} of {total}", f"{self.moved:.0f}"]
        return f"| {' | '.join(cells)} |"


def header(busy: int, has_ap: bool) -> str:
    titles = ["", "MiB", "time / the model's", "CPU time"]
    titles += [f"time beside {busy} busy processes"] if busy else []
    titles += ["AP"] if has_ap else []
    titles += ["scores differ by", "boxes, px", "scores, in the file's order", "boxes, px"]
    titles += [f"beyond {SCORE:g} or {PIXELS:g} px", "proposals ranked otherwise"]
    return f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}"


class Replay:
    """Detections as the evaluation gets them from a detector.

    Args:
        detections: of the test set's images, in its order.
    """

    def __init__(self, detections: Iterable[Detections]):
        self.detections = iter(detections)

    def __call__(self, inputs: list[dict]) -> list[dict]:
        outputs = []
        for entry, (boxes, scores, classes) in zip(inputs, self.detections):
            height, width = entry["height"], entry["width"]
            ratios = [width / entry["image"].shape[2], height / entry["image"].shape[1]] * 2
            found = Instances((height, width))
            found.pred_boxes, found.scores = Boxes(boxes * torch.tensor(ratios)), scores
            found.pred_classes = classes
            outputs.append({"instances": found[found.pred_boxes.nonempty()]})
        return outputs


def as_batch(image: Tensor) -> tuple[Tensor, Tensor]:
    return image[None].float(), torch.tensor([image.shape[1:]])


def spread(detector: Detector) -> None:
    """Let scores of random weights differ, and layers that start at zero count."""
    for name, parameter in detector.named_parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
        if "class_embed" in name and name.endswith("weight"):
            parameter *= 4


class Reference:
    """The model's detections of images, and comparisons with them.

    Args:
        detector: the model.
        batches: images ``[1, 3, H, W]`` and their sizes ``[1, 2]``.
        least_score: of a detection that is compared.
    """

    def __init__(
        self, detector: Detector, batches: Sequence[tuple[Tensor, Tensor]], least_score: float
    ):
        self.run = check.run_detector(detector)
        self.batches, self.least_score = batches, least_score
        self.has_proposals = isinstance(detector.queries, ProposalQueries)
        self.own = [next(self.run(*batch)) for batch in batches]
        self.total = sum(int((found.scores >= least_score).sum()) for found in self.own)
        # Of the proposals, as far as a runtime's was the same.
        self.orders: list[Tensor | None] = [None] * len(self.own)

    def compare(self, run: Run) -> tuple[list[Detections], Differences, Differences, float]:
        """Return a runtime's detections, their differences as they are and with the model's
        proposals in its order, and the mean number of ranks with another proposal."""
        results, moved = [], []
        own, ordered = Differences(), Differences()
        for number, batch in enumerate(self.batches):
            [found], order = run(*batch)
            difference = compare(self.own[number], found, self.least_score)
            results.append(found)
            own = own.join(difference)
            moved.append(0)
            known = self.orders[number]
            if (
                self.has_proposals
                and order is not None
                and not (known is not None and torch.equal(known, order))
            ):
                with ProposalOrder(order) as given:
                    [expected] = self.run(*batch)
                moved[-1] = given.reordering.moved
                difference = compare(expected, found, self.least_score)
                self.orders[number] = known if moved[-1] else order
            ordered = ordered.join(difference)
        return results, own, ordered, statistics.mean(moved)


def write_files(detector: Detector, folder: Path) -> None:
    """Write the detector in each format that a runtime needs; it is traced twice."""
    program = export_program(detector)
    save_onnx(program, folder / ONNX, {})
    save_openvino(folder / ONNX, folder / OPENVINO, {})
    save_program(program, folder / PROGRAM)
    # What --dtype float16-decoder does, without another translation.
    model = onnx.load(folder / ONNX)
    convert_to_half(model, decoder_only=True)
    onnx.save(model, folder / DECODER_16)
    write_onnx(detector, folder / ONNX_16, {}, OPSET, "float16")


def file_size(path: Path) -> int:
    """Return the bytes of a file and of those beside it that differ in the ending alone."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*"))


def take_turns(runs: Sequence[Callable[[], object]], rounds: int) -> list[tuple[float, float]]:
    """Return the medians of each: seconds that pass, and those of the CPU."""
    taken = []
    for _ in range(rounds):
        for run in runs:
            start = time.perf_counter(), time.process_time()
            run()
            end = time.perf_counter(), time.process_time()
            taken.append([after - before for before, after in zip(start, end)])
    rounds_of = (taken[i :: len(runs)] for i in range(len(runs)))
    return [tuple(map(statistics.median, zip(*rows))) for rows in rounds_of]


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Keep as many processes busy as long as the context lasts."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@torch.no_grad()
def measure(args: argparse.Namespace) -> tuple[list[Row], int, int]:
    """Return the rows, the model's first; the number of images, and of detections compared.

    Raises:
        MissingFileError, ConfigError: see :func:`lite_detr.overrides.load_config`.
        WeightsError: see :class:`lite_detr.checkpoint.DetrCheckpointer`.
        ExportError: it cannot be exported, or a runtime or the processor lacks something.
    """
    torch.manual_seed(0)
    cfg = load_config(args.config_file, args.opts)
    detector = instantiate(cfg.model).eval()
    if args.weights:
        DetrCheckpointer(detector).load(args.weights)
    else:
        spread(detector)
    if args.evaluate:
        loader = instantiate(cfg.dataloader.test)
        batches = [as_batch(entry["image"]) for entries in loader for entry in entries]
    else:
        batches = [as_batch(noise(args.size))]
    reference = Reference(detector, batches, args.least_score)
    runs, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        write_files(detector, Path(folder))
        for name, (file, load) in RUNTIMES.items():
            runs[name] = run = load(Path(folder, file), args.threads)
            results, *found = reference.compare(run)
            ap = evaluate(cfg, Replay(results))["bbox"]["AP"] if args.evaluate else None
            rows.append(Row(name, file_size(Path(folder, file)), [], ap, *found))
            print(name, *rows[-1][1:], flush=True)
    ap = evaluate(cfg, detector)["bbox"]["AP"] if args.evaluate else None
    first = Row("PyTorch, the model", None, [], ap, Differences(), Differences(), 0.0)
    rows.insert(0, first)
    turns = [lambda: detector([{"image": batches[0][0][0]}])]
    turns += [lambda run=run: run(*batches[0]) for run in runs.values()]
    take_turns(turns, 1)
    times = take_turns(turns, args.rounds)
    if args.busy:
        with busy_processes(args.busy):
            times = [
                (*alone, beside[0]) for alone, beside in zip(times, take_turns(turns, args.rounds))
            ]
    rows = [row._replace(seconds=list(taken)) for row, taken in zip(rows, times)]
    return rows, len(batches), reference.total


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--config-file", required=True, metavar="C", help="a file or a name of the zoo")
    add("--evaluate", action="store_true", help="use the config's test set, and measure AP on it")
    add("--least-score", type=float, default=0.01, help="of a detection that is compared")
    add("--busy", type=cli.whole_number(0), default=0, metavar="N", help="busy processes")
    add_run_options(parser)
    return parser.parse_args(argv)


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    rows, num_images, total = measure(args)
    has_ap = rows[0].ap is not None
    table = [header(args.busy, has_ap), *(row.text(rows[0], total) for row in rows)]
    where = environment("cpu")
    height, width = args.size
    images = f"{num_images} images" if args.evaluate else f"An image of {height}x{width}"
    text = "\n".join(table) + (
        f"\n\n`{args.config_file}`: {images}, detections that score {args.least_score:g} or more, "
        f"threads {args.threads}, medians of {args.rounds} turns, the model's "
        f"{1000 * rows[0].seconds[0]:.0f} ms and {1000 * rows[0].seconds[1]:.0f} ms of the CPU; "
        f"{where['cpu']}, PyTorch {where['torch']}, ONNX Runtime {version('onnxruntime')}, "
        f"OpenVINO {version('openvino')}."
    )
    print(f"\n{text}")
    if args.markdown:
        write_tables(args.markdown, text)


if __name__ == "__main__":
    main()
