#!/usr/bin/env python
"""Kill a training run again and again, and compare its result with that of an undisturbed run.

    soak.py --config-file digits/lite_dino_efficientnet_lite0.py --num-gpus 2 --kill-every 180 \\
        --output output/soak train.max_iter=2000 train.checkpointer.period=50

trains twice with train_net.py: first undisturbed, then with SIGKILL, or in every third case
SIGTERM, at random moments, and --resume. At the end weights, the optimizer's state, all random
generators and metrics.json must be the same, except for times. If so, the exit status is 0, else 1.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lite_detr import cli
from lite_detr.checkpoint.files import read_torch
from lite_detr.engine.preemption import EXIT_CODE
from lite_detr.engine.resume import LAST

PROGRAM = Path(__file__).parents[1] / "train_net.py"
# Records that differ in any two runs.
TIMES = {"time", "data_time", "rank_data_time", "eta_seconds"}
# The program itself was killed, or a process that it started.
KILLED = [sign for n in (signal.SIGTERM, signal.SIGKILL) for sign in (-n, 128 + n)]
# After this number of starts in a row that saved nothing, kills come too soon.
PATIENCE = 5


def differences(undisturbed: Path, disturbed: Path) -> list[str]:
    """Return how the checkpoints and records of two output folders differ, one line each."""
    # Not the one that is saved when a scheduler asks the run to leave.
    names = {path.name for path in undisturbed.glob("model_*.pth")} - {f"{LAST}.pth"}
    found = []
    for name in sorted(names):
        if not (disturbed / name).is_file():
            found.append(f"{name}: only the undisturbed run has it")
            continue
        contents = [read_torch(str(folder / name)) for folder in (undisturbed, disturbed)]
        found += [f"{name}: {where}" for where in unequal("", *contents)]
    if records(undisturbed) != records(disturbed):
        found.append("metrics.json: the records differ")
    return found


def unequal(where: str, a: Any, b: Any) -> Iterator[str]:
    """Yield the paths at which two states differ, except for times and what depends on them."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = (a.keys() | b.keys()) - TIMES - {"size"}
        for key in sorted(keys, key=str):
            if key in a and key in b:
                yield from unequal(f"{where}/{key}", a[key], b[key])
            else:
                yield f"{where}/{key} is in one only"
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield where
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for index, pair in enumerate(zip(a, b)):
            yield from unequal(f"{where}/{index}", *pair)
    elif a != b and not (is_nan(a) and is_nan(b)):
        yield where


def is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def records(folder: Path) -> list[str]:
    """Return the lines of metrics.json without times, as text, in which NaN equals NaN."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [
        json.dumps({key: value for key, value in line.items() if key not in TIMES}, sort_keys=True)
        for line in lines
    ]


class Soak:
    """Two training runs with the same options.

    Args:
        options: the options of train_net.py.
        kill_every: the mean time between kills, in seconds.
        rng: decides when to kill, and how.
    """

    def __init__(self, options: Sequence[str], kill_every: float, rng: random.Random):
        self.options = list(options)
        self.kill_every = kill_every
        self.rng = rng

    def start(self, folder: Path, *more: str) -> subprocess.Popen:
        folder.mkdir(parents=True, exist_ok=True)
        # Any free port, as that of the killed start may still be taken.
        more = ("--dist-url", "auto", *more)
        command = [sys.executable, PROGRAM, *more, *self.options, f"train.output_dir={folder}"]
        with open(folder / "output.txt", "ab") as file:
            # In its own session, so that a kill reaches all its processes and no other.
            return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)

    def undisturbed(self, folder: Path) -> float:
        """Train, and return the seconds it took."""
        start = time.monotonic()
        process = self.start(folder)
        if process.wait() != 0:
            raise SystemExit(f"error: the undisturbed run failed: see {folder}/output.txt")
        return time.monotonic() - start

    def disturbed(self, folder: Path) -> list[str]:
        """Train, and return how each start ended, except for the last, which completed the run."""
        ends, fruitless, progress = [], 0, tqdm(desc="starts", unit="start", disable=None)
        while True:
            before = last_checkpoint(folder)
            process = self.start(folder, "--resume")
            progress.update()
            deadline = self.rng.expovariate(1 / self.kill_every)
            number = signal.SIGTERM if self.rng.random() < 1 / 3 else signal.SIGKILL
            try:
                status = process.wait(deadline)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, number)
                status = process.wait()
            if status == 0:
                progress.close()
                return ends
            if status not in (EXIT_CODE, *KILLED):
                raise SystemExit(f"error: exit status {status}: see {folder}/output.txt")
            ends.append(f"{number.name} after {deadline:.0f} s: exit status {status}")
            fruitless = fruitless + 1 if last_checkpoint(folder) == before else 0
            if fruitless > PATIENCE:
                raise SystemExit(
                    f"error: {fruitless} starts in a row saved nothing: raise --kill-every, which "
                    f"is {self.kill_every:g} s, or lower train.checkpointer.period"
                )


def last_checkpoint(folder: Path) -> tuple[str, float]:
    """Return its name, and when it was written."""
    path = folder / "last_checkpoint"
    return (path.read_text(), path.stat().st_mtime) if path.exists() else ("", 0.0)


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    cli.add_config_file(parser)
    number = cli.whole_number(1)
    parser.add_argument("--num-gpus", type=number, default=1, help="processes, on CPUs also")
    parser.add_argument("--kill-every", type=float, default=180, help="mean time in seconds")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kills")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="key=value, for the config")
    return parser.parse_args(arguments)


@cli.user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    if args.output.exists():
        sys.exit(f"error: {args.output} exists already: give a new folder")
    options = ["--config-file", args.config_file, "--num-gpus", str(args.num_gpus), *args.options]
    soak = Soak(options, args.kill_every, random.Random(args.seed))
    undisturbed, disturbed = args.output / "undisturbed", args.output / "disturbed"
    seconds = soak.undisturbed(undisturbed)
    print(f"undisturbed: {seconds / 60:.1f} min")
    start = time.monotonic()
    ends = soak.disturbed(disturbed)
    print(f"disturbed: {(time.monotonic() - start) / 60:.1f} min, {len(ends)} kills")
    for end in ends:
        print(f"  {end}")
    found = differences(undisturbed, disturbed)
    for line in found[:20]:
        print(f"  differs: {line}")
    sys.exit(f"error: {len(found)} differences" if found else None)


if __name__ == "__main__":
    main()
