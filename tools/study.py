#!/usr/bin/env python
"""Train several detectors with several seeds, and compare their AP.

study.py --study study/encoders.json --output output/study --jobs 2 data.train_json=...
study.py --study study/encoders.json --output output/study --step-times times.json \
    --markdown accuracy.md data.train_json=...

The study is a JSON file: {"seeds": [0, 1, 2], "variants": [{"name": "Lite-DINO", "config":
"digits/lite_dino_efficientnet_lite0.py", "overrides": ["key=value"]}, ...]}. Overrides on the
command line are for all variants. Each run has a folder NAME/seed_N in --output; a run that was
interrupted goes on, and one that is complete is not repeated, so that the same command continues a
study. --output gets results.json, with a curve for each run, and curves.png.

Trainings side by side, and whatever else a machine does, disturb each other's times. A run's time
is hence its iterations times that of a training step, from a file that
benchmarks/detectors.py --tasks training --json wrote with the configs taking turns.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
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

    def curve(self) -> list[tuple[int, float]]:
        """Return iterations and AP at each evaluation so far."""
        file = self.folder / "metrics.json"
        # The evaluation at the end is recorded behind the last iteration. One that was interrupted
        # is made again.
        found = {
            min(record["iteration"] + 1, self.iterations): record[METRIC]
            for record in (read_records(file.read_bytes()) if file.exists() else ())
            if METRIC in record
        }
        return sorted(found.items())


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
        ConfigError: an override does not fit a config.
    """
    variants, seeds = read_study(args.study)
    iterations = {
        v.name: load_config(v.config, [*v.overrides, *args.opts]).train.max_iter for v in variants
    }
    return [
        Run(v, seed, args.output / folder_name(v.name) / f"seed_{seed}", iterations[v.name])
        for seed, v in product(seeds, variants)
    ]


def read_step_times(path: Path, variants: Iterable[Variant]) -> dict[str, float]:
    """Return the seconds of a training step of each config, by its name in the variants.

    Raises:
        ConfigError: it is not such a file, or lacks a config.
    """
    try:
        seconds = {
            record["case"]["subject"]: record["milliseconds"]["latency"]["median"] / 1e3
            for record in json.loads(path.read_text())["records"]
            if record["case"]["task"] == "training"
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} has no times of training steps ({type(error).__name__}: {error}): write it by "
            "benchmarks/detectors.py --tasks training --json FILE"
        ) from error
    missing = sorted({variant.config for variant in variants} - set(seconds))
    if missing:
        raise ConfigError(f"{path} has no time of {', '.join(missing)}: it has {list(seconds)}")
    return seconds


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
    print(f"{run.folder}: AP {run.curve()[-1][1]:.2f}", flush=True)


def summarize(runs: Sequence[Run], seconds: Mapping[str, float] | None) -> dict[str, Any]:
    """Return each variant's iterations, seconds of a step if known, and curves by seed."""
    variants: dict[str, Any] = {}
    for run in runs:
        found = variants.setdefault(
            run.variant.name,
            {
                "config": run.variant.config,
                "overrides": run.variant.overrides,
                "iterations": run.iterations,
                "seconds_per_step": seconds and seconds[run.variant.config],
                "curves": {},
            },
        )
        found["curves"][run.seed] = run.curve()
    return variants


def table(variants: Mapping[str, Any]) -> str:
    timed = any(found["seconds_per_step"] for found in variants.values())
    header = ["variant", "iterations", *["minutes"] * timed, "AP", "AP of each seed"]
    rows = [header, ["---"] * len(header)]
    for name, found in variants.items():
        precisions = [curve[-1][1] for curve in found["curves"].values()]
        minutes = [f"{found['iterations'] * found['seconds_per_step'] / 60:.1f}"] if timed else []
        each = ", ".join(f"{ap:.1f}" for ap in precisions)
        rows.append([name, str(found["iterations"]), *minutes, spread(precisions), each])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation as text."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def draw(variants: Mapping[str, Any], path: Path) -> None:
    """Draw the mean AP against iterations, and time if known, with a band over the seeds."""
    timed = all(found["seconds_per_step"] for found in variants.values())
    figure = Figure(figsize=(11 if timed else 6, 4.5), layout="constrained")
    axes = figure.subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
    for name, found in variants.items():
        curves = list(found["curves"].values())
        iterations = np.array([done for done, _ in curves[0]])
        precisions = np.array([[ap for _, ap in curve] for curve in curves])
        for axis, unit in zip(axes, (1.0, (found["seconds_per_step"] or 0.0) / 60)):
            axis.plot(iterations * unit, precisions.mean(0), ".-", label=name)
            axis.fill_between(iterations * unit, precisions.min(0), precisions.max(0), alpha=0.15)
    for axis, label in zip(axes, ("iterations", "minutes of training")):
        axis.set(xlabel=label, xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="AP, %: mean, lowest and highest")
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
    add(
        "--step-times",
        type=Path,
        metavar="FILE",
        help="the JSON of benchmarks/detectors.py with the same configs",
    )
    add("--markdown", type=page, metavar="PAGE", help="write the table into this page")
    cli.add_overrides(parser)
    return parser.parse_intermixed_args(argv)


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    runs = plan(args)
    seconds = args.step_times and read_step_times(args.step_times, [run.variant for run in runs])
    executor = ThreadPoolExecutor(args.jobs)
    try:
        for done in [executor.submit(train, run, args.opts) for run in runs]:
            done.result()
    finally:
        executor.shutdown(cancel_futures=True)
    variants = summarize(runs, seconds)
    results = {"options": args.opts, "variants": variants}
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(variants, args.output / "curves.png")
    text = table(variants)
    print(text)
    if args.markdown:
        write_tables(args.markdown, text)


if __name__ == "__main__":
    sys.exit(main())
