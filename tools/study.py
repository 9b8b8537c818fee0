#!/usr/bin/env python
"""Train several detectors with several seeds for equally many iterations, and compare their AP.

study.py --study study.json --output output/study --jobs 2 train.max_iter=3000
study.py --study study.json --output output/study --markdown docs/accuracy.md train.max_iter=3000

The study is a JSON file: {"seeds": [0, 1, 2], "variants": [{"name": "Lite-DINO", "config":
"digits/lite_dino_efficientnet_lite0.py", "overrides": ["key=value"]}, ...]}. Overrides on the
command line are for all variants. Each run has a folder NAME/seed_N in --output; a run that was
interrupted goes on, and one that is complete is not repeated, so that the same command continues a
study. --output gets results.json, with a curve for each run, and curves.png. Time is that of
training alone, without evaluations, from metrics.json; it compares only runs of one machine.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from lite_detr import cli
from lite_detr.analysis.markdown_page import page, write_tables
from lite_detr.engine.resume import read_records
from lite_detr.errors import ConfigError, LiteDetrError
from lite_detr.overrides import load_config

METRIC = "bbox/AP"
HEADER = (
    "| variant | seeds | AP | lowest and highest | training time, min | AP after {:.1f} min |\n"
    "|---|---|---|---|---|---|"
)


class Variant(NamedTuple):
    name: str
    config: str
    overrides: list[str]


class Run(NamedTuple):
    """A variant's training run with one seed.

    Attributes:
        folder: its ``train.output_dir``.
        iterations: its ``train.max_iter``.
    """

    variant: Variant
    seed: int
    folder: Path
    iterations: int

    @property
    def is_complete(self) -> bool:
        curve = self.curve()
        return bool(curve) and curve[-1][0] == self.iterations

    def curve(self) -> list[tuple[int, float, float]]:
        """Return iterations, seconds of training and AP at each evaluation so far."""
        file = self.folder / "metrics.json"
        records = sorted(
            read_records(file.read_bytes()) if file.exists() else (),
            key=lambda record: record["iteration"],
        )
        times = [(r["iteration"] + 1, r["time"]) for r in records if "time" in r]
        if not times:
            return []
        # Each is the median of up to 20 iterations before it. The first ones after a new start, and
        # maybe the last ones, have none: theirs is that of the nearest record.
        times.append((max(self.iterations, times[-1][0]), times[-1][1]))
        ends, medians = zip(*times)
        seconds = np.cumsum(np.diff(ends, prepend=0) * np.array(medians))
        # The evaluation at the end is recorded behind the last iteration.
        return [
            (done, float(np.interp(done, [0, *ends], [0.0, *seconds])), record[METRIC])
            for record in records
            if METRIC in record
            for done in [min(record["iteration"] + 1, self.iterations)]
        ]


def read_study(path: Path) -> tuple[list[Variant], list[int]]:
    """Return the variants and the seeds of a study's file.

    Raises:
        ConfigError: it is not such a file.
    """
    try:
        study = json.loads(path.read_text())
        seeds = [int(seed) for seed in study["seeds"]]
        variants = [
            Variant(str(v["name"]), str(v["config"]), [str(o) for o in v.get("overrides", ())])
            for v in study["variants"]
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not a study ({type(error).__name__}: {error}): it must hold 'seeds', a "
            "list of numbers, and 'variants', a list of objects with 'name' and 'config'"
        ) from error
    folders = [folder_name(variant.name) for variant in variants]
    if not (seeds and variants) or len({*folders}) < len(folders) or len({*seeds}) < len(seeds):
        raise ConfigError(f"{path} must hold a seed and a variant or more, each only once")
    return variants, seeds


def folder_name(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name)


def plan(args: argparse.Namespace) -> list[Run]:
    """Return all runs, a seed of every variant before the next seed.

    Raises:
        ConfigError: an override does not fit a config, or the numbers of iterations differ.
    """
    variants, seeds = read_study(args.study)
    iterations = {
        v.name: load_config(v.config, [*v.overrides, *args.opts]).train.max_iter for v in variants
    }
    return [
        Run(v, seed, args.output / folder_name(v.name) / f"seed_{seed}", iterations[v.name])
        for seed, v in product(seeds, variants)
    ]


def train(run: Run, opts: Sequence[str]) -> None:
    """Train or continue a run in a process with one thread; its output goes to ``study.log``.

    Raises:
        LiteDetrError: the run ended with an error.
    """
    if run.is_complete:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    options = [f"train.seed={run.seed}", f"train.output_dir={run.folder}"]
    command = ["-m", "lite_detr", "train", "--config-file", run.variant.config, "--num-gpus", "1"]
    command += ["--resume", *run.variant.overrides, *opts, *options]
    log = run.folder / "study.log"
    with open(log, "ab") as file:
        status = subprocess.run(
            [sys.executable, *command],
            env={"OMP_NUM_THREADS": "1", **os.environ},
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    if status or not run.is_complete:
        raise LiteDetrError(f"a run has ended with status {status}: see {log}; then start again")
    print(f"{run.folder}: AP {run.curve()[-1][2]:.2f}", flush=True)


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the results: a curve for each run, and for each variant its spread.

    ``seconds`` is the time of the fastest run, at which all are compared.
    """
    curves = {(run.variant.name, run.seed): run.curve() for run in runs}
    seconds = min(curve[-1][1] for curve in curves.values())
    variants = {}
    for name in dict.fromkeys(run.variant.name for run in runs):
        own = [curve for (other, _), curve in curves.items() if other == name]
        variants[name] = {
            "AP": [curve[-1][2] for curve in own],
            "seconds": [curve[-1][1] for curve in own],
            "AP_at_equal_time": [at_time(curve, seconds) for curve in own],
        }
    return {
        "iterations": runs[0].iterations,
        "seconds": seconds,
        "variants": variants,
        "runs": [
            {"variant": name, "seed": seed, "curve": curve}
            for (name, seed), curve in curves.items()
        ],
    }


def at_time(curve: Sequence[tuple[int, float, float]], seconds: float) -> float:
    """Return the AP at a time, between evaluations on a straight line; 0 at the start."""
    _, times, values = zip((0, 0.0, 0.0), *curve)
    return float(np.interp(seconds, times, values))


def table(results: dict[str, Any]) -> str:
    rows = [HEADER.format(results["seconds"] / 60)]
    for name, found in results["variants"].items():
        precisions = found["AP"]
        rows.append(
            f"| {name} | {len(precisions)} | {spread(precisions)} "
            f"| {min(precisions):.2f}, {max(precisions):.2f} "
            f"| {statistics.mean(found['seconds']) / 60:.1f} "
            f"| {spread(found['AP_at_equal_time'])} |"
        )
    return "\n".join(rows)


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation as text."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw AP against iterations and against time: a line for each run, a colour for a variant."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = {name: f"C{i}" for i, name in enumerate(results["variants"])}
    for run in results["runs"]:
        iterations, seconds, precisions = zip(*run["curve"])
        for axis, x in zip(axes, (iterations, [s / 60 for s in seconds])):
            axis.plot(x, precisions, ".-", color=colours[run["variant"]], alpha=0.7)
    for axis, label in zip(axes, ("iterations", "minutes of training")):
        axis.set(xlabel=label, ylabel="AP, %", xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    for name, colour in colours.items():
        axes[0].plot([], [], color=colour, label=name)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--study", required=True, type=Path, metavar="FILE", help="the variants and the seeds")
    add("--output", required=True, type=Path, metavar="DIR", help="the runs and the results")
    add(
        "--jobs",
        type=cli.whole_number(1),
        default=1,
        metavar="N",
        help="runs side by side, each with one thread (default: %(default)s)",
    )
    add("--markdown", type=page, metavar="PAGE", help="write the table into this page")
    cli.add_overrides(parser)
    return parser.parse_intermixed_args(argv)


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    runs = plan(args)
    executor = ThreadPoolExecutor(args.jobs)
    try:
        for done in [executor.submit(train, run, args.opts) for run in runs]:
            done.result()
    finally:
        executor.shutdown(cancel_futures=True)
    results = summarize(runs)
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, args.output / "curves.png")
    text = table(results)
    print(text)
    if args.markdown:
        write_tables(args.markdown, text)


if __name__ == "__main__":
    sys.exit(main())
