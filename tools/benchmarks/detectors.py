#!/usr/bin/env python
"""Time detectors part by part, in inference and in training, and measure their memory.

detectors.py --config-file dino/dino_r50_4scale_36ep.py dino/lite_dino_r50_h3l1_2p1x3_36ep.py
detectors.py --compare A.py B.py --tasks training --sizes 800x1066 --batch 2 --rounds 15
detectors.py --config-file A.py --operators native pytorch --compile off on --competitors
detectors.py --config-file A.py --optimize off on --rates --competitors
detectors.py --config-file A.py B.py --device cuda --dtype float32 bfloat16 --json benchmark.json

All options are combined: each config with each task, size, batch, dtype and so on. Those with the
same task, size and batch take turns, one pass each per round, in reverse every other round, so that
whatever else the machine does affects all of them alike. Weights, image and objects are random.

Figures are medians over the rounds, in milliseconds, with the first and the last decile. Latency is
everything except the data, which a data loader's workers prepare meanwhile: the time to read,
resize and collate a batch is listed separately. README.md in this folder says what belongs to which
part, and how memory is measured.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import competitor
import detectron2
import efficientdet
import torch
from calls import add_opts, check_device, environment, naming
from records import TASKS, Case, Memory, Record, common_text, comparison, draw, table
from subjects import CHOICES, OFF, build_detector
from tqdm import tqdm
from turns import CLOCKS, WARM_UP, Runner, memory_in_own_process

import lite_detr
from lite_detr import cli, model_zoo, ops
from lite_detr.analysis.flops import count_cost
from lite_detr.errors import LiteDetrError
from lite_detr.inference import DTYPES

COMPETITORS = (competitor.NAME, efficientdet.NAME)
COMPILE = {"off": False, "on": True}
# Rows and columns: enough work for all cores, but not too much if the processor lacks the dtype.
SIDE = 1024


def groups(args: argparse.Namespace) -> list[list[Case]]:
    """Return the requested cases; those of one list take turns."""
    found = []
    for task, size, batch in itertools.product(args.tasks, args.sizes, args.batch):
        subjects = list(itertools.product(args.config_file, args.operators))
        if args.competitors:
            subjects.append((competitor.NAME, competitor.OPERATORS))
            if task == "inference" and efficientdet.is_installed():
                subjects.append((efficientdet.NAME, competitor.OPERATORS))
        cases = (
            Case(
                subject=subject,
                overrides=tuple(args.opts),
                task=task,
                size=size,
                batch=batch,
                dtype=dtype,
                # A competitor cannot be optimized, and is listed once.
                optimized=OFF if subject in COMPETITORS else optimized,
                compiled=COMPILE[compiled],
                operators=operators,
                device=args.device,
                threads=args.threads,
                clock=args.clock,
            )
            for dtype, optimized, compiled in itertools.product(
                args.dtype, args.optimize, args.compile
            )
            for subject, operators in subjects
        )
        found.append(list(dict.fromkeys(cases)))
    return found


def measure(
    cases: Sequence[Case], rounds: int, with_memory: bool, with_rates: bool = False
) -> list[Record]:
    """Let the cases take turns, and return a record of each."""
    memories: list[Memory | None] = [None] * len(cases)
    if with_memory:
        for index, case in enumerate(tqdm(cases, unit="memory")):
            with naming(case.name):
                memories[index] = memory_in_own_process(case)
    if any(case.compiled for case in cases):
        # Cases share code, which is compiled for each of them. Without room for all, some would
        # silently not be compiled.
        torch.compiler.reset()
        # torch.compiler has no public names for these two.
        torch._dynamo.config.recompile_limit = 8 * len(cases)
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    runners = []
    for case in cases:
        with naming(case.name):
            runners.append(Runner(case))
    times = [[] for _ in cases]
    products = {case.dtype: MatrixProduct(case) for case in cases} if with_rates else {}
    rates = {dtype: [] for dtype in products}
    for index in tqdm(range(WARM_UP + rounds), unit="round"):
        turns = list(zip(runners, times))
        for runner, samples in turns if index % 2 else reversed(turns):
            with naming(runner.case.name):
                seconds = runner.turn()
            if index >= WARM_UP:
                samples.append(seconds)
        for dtype, product in products.items():
            rate = product.turn()
            if index >= WARM_UP:
                rates[dtype].append(rate)
    return [
        Record(
            case,
            {name: [turn[name] for turn in samples] for name in samples[0]},
            memory,
            multiply_adds(case.subject, case.overrides, case.size) if with_rates else None,
            rates.get(case.dtype, ()),
        )
        for case, samples, memory in zip(cases, times, memories)
    ]


@functools.cache
def multiply_adds(subject: str, overrides: tuple[str, ...], size: tuple[int, int]) -> float | None:
    """Count the multiply-adds of one image; None if :mod:`lite_detr.analysis.flops` cannot."""
    if subject in COMPETITORS:
        return None
    return count_cost(build_detector(subject, overrides), *size).flops["total"]


class MatrixProduct:
    """A product of two square matrices: the fastest multiply-adds that a machine can do."""

    def __init__(self, case: Case):
        self.device = case.device
        dtype = getattr(torch, case.dtype)
        self.matrices = torch.randn(2, SIDE, SIDE, device=case.device).to(dtype)

    def turn(self) -> float:
        """Return the multiply-adds a second of one product, after one to warm up."""
        for _ in range(2):
            self._wait()
            start = time.perf_counter()
            torch.mm(*self.matrices)
            self._wait()
            seconds = time.perf_counter() - start
        return SIDE**3 / seconds

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def comparisons(records: Sequence[Record]) -> Iterator[str]:
    """Yield a table for every two cases that differ only in the subject, with what they share."""
    alike: dict[Case, list[Record]] = {}
    for record in records:
        alike.setdefault(dataclasses.replace(record.case, subject=""), []).append(record)
    for pair in alike.values():
        if len(pair) == 2:  # Nothing else has a competitor's operators.
            yield f"{common_text(pair)}\n\n{comparison(*pair)}"


def versions(device: str) -> dict[str, object]:
    """Return the names and versions of the machine and its software."""
    found = environment(device)
    found |= {"lite_detr": lite_detr.__version__, "detectron2": detectron2.__version__}
    for package in ("torchvision", "transformers", "effdet"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def report(records: Sequence[Record], args: argparse.Namespace) -> None:
    """Print the tables, and write the requested files."""
    where = versions(args.device)
    print(", ".join(f"{name} {value}" for name, value in where.items() if value is not None))
    print(f"\n{common_text(records)}\n\n{table(records)}")
    if args.compare:
        for text in comparisons(records):
            print(f"\n{text}")
    if args.json:
        figures = {"environment": where, "records": [record.as_json() for record in records]}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if args.chart:
        draw(records, args.chart)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    many = dict(nargs="+")
    add = parser.add_argument
    configs = parser.add_mutually_exclusive_group(required=True)
    configs.add_argument(
        "--config-file", **many, metavar="C", help="files or names of the model zoo"
    )
    configs.add_argument(
        "--compare",
        nargs=2,
        metavar="C",
        help="two of them, with ratios of the second to the first",
    )
    add(
        "--competitors",
        action="store_true",
        help="also transformers' Deformable DETR, and effdet's EfficientDet-D6 if installed",
    )
    add("--tasks", **many, choices=TASKS, default=["inference"])
    add("--sizes", **many, type=cli.size, default=[(800, 1066)], metavar="HxW", help="px")
    add("--batch", **many, type=cli.whole_number(1), default=[1], help="images at a time")
    add("--dtype", **many, choices=DTYPES, default=["float32"], help="16 bits by autocast")
    add(
        "--optimize",
        **many,
        choices=CHOICES,
        default=[OFF],
        help="for inference, fully or by one step; if on, weights have the 16 bits",
    )
    add(
        "--compile",
        **many,
        choices=COMPILE,
        default=["off"],
        help="compile the parts by torch.compile",
    )
    add(
        "--operators", **many, choices=("native", "pytorch"), help="default: what a model would use"
    )
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=cli.whole_number(1), default=torch.get_num_threads(), help="of the CPU")
    add(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="process: CPU time, for a machine that others use as well",
    )
    add("--rounds", type=cli.whole_number(1), default=7, help="measured, after two to warm up")
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure it as well")
    add(
        "--rates",
        action="store_true",
        help="multiply-adds a second, compared with a matrix product's",
    )
    add("--json", type=Path, help="write all figures to this file")
    add("--chart", type=Path, help="draw them as bars in this picture")
    add_opts(parser)
    args = parser.parse_args(argv)
    if "training" in args.tasks and (args.rates or args.optimize != [OFF]):
        parser.error("--optimize and --rates are for --tasks inference only")
    if args.device != "cpu" and args.clock != "wall":
        parser.error("--clock process is for --device cpu only")
    args.config_file = args.config_file or args.compare
    if args.operators is None:
        args.operators = ["pytorch" if ops.backend(args.device) == "pytorch" else "native"]
    return args


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    check_device(args.device, native="native" in args.operators)
    if args.competitors and not competitor.is_installed():
        raise LiteDetrError(
            "--competitors needs the transformers library: pip install transformers"
        )
    for config in args.config_file:
        model_zoo.get_lazy_config_file(config)
    torch.set_num_threads(args.threads)
    records: list[Record] = []
    try:
        for cases in groups(args):
            records += measure(cases, args.rounds, args.memory, args.rates)
    finally:
        # Keeps what was measured before the memory ran out, say.
        if records:
            report(records, args)


if __name__ == "__main__":
    main()
