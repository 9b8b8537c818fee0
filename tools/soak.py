#!/usr/bin/env python
"""Kill a training again and again, and compare how it ends with an undisturbed one.

    soak.py --config-file digits/lite_dino_efficientnet_lite0.py --num-gpus 2 --kill-every 180 \\
        --output output/soak train.max_iter=2000 train.checkpointer.period=50

trains twice by train_net.py: first undisturbed, then with SIGKILL, or in every third case SIGTERM,
at random moments, and --resume. At the end weights, the optimizer's state, all random generators
and metrics.json have to be the same, but for times. The exit status is 0 if so, and otherwise 1.
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

from lite_detr.checkpoint.files import read_torch
from lite_detr.engine.preemption import EXIT_CODE
from lite_detr.engine.resume import LAST

PROGRAM = Path(__file__).parents[1] / "train_net.py"
# What no two runs have alike.
TIMES = {"time", "data_time", "rank_data_time", "eta_seconds"}
# The program itself was killed, or a process that it had started.
KILLED = [sign for n in (signal.SIGTERM, signal.SIGKILL) for sign in (-n, 128 + n)]
# After these many starts in a row that saved nothing, a kill comes too soon for the training.
PATIENCE = 5


def differences(undisturbed: Path, disturbed: Path) -> list[str]:
    """In what the checkpoints and records of two output folders differ, one line each."""
    # Not the one that is saved when a scheduler asks to leave.
    names = {path.name for path in undisturbed.glob("model_*.pth")} - {f"{LAST}.pth"}
    found = []
    for name in sorted(names):
        if not (disturbed / name).is_file():
            found.append(f"{name}: only the undisturbed training has it")
            continue
        contents = [read_torch(str(folder / name)) for folder in (undisturbed, disturbed)]
        found += [f"{name}: {where}" for where in unequal("", *contents)]
    if records(undisturbed) != records(disturbed):
        found.append("metrics.json: the records differ")
    return found


def unequal(where: str, a: Any, b: Any) -> Iterator[str]:
    """The paths at which two states differ; times and what depends on them are left out."""
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
    """The lines of metrics.json without times, as text, in which NaN equals NaN."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [
        json.dumps({key: value for key, value in line.items() if key not in TIMES}, sort_keys=True)
        for line in lines
    ]


class Soak:
    """Two trainings by the same options.

    Args:
        options: of train_net.py.
        kill_every: seconds between kills, in the mean.
        rng: says when to kill, and how.
    """

    def __init__(self, options: Sequence[str], kill_every: float, rng: random.Random):
        self.options = list(options)
        self.kill_every = kill_every
        self.rng = rng

    def start(self, folder: Path, *more: str) -> subprocess.Popen:
        folder.mkdir(parents=True, exist_ok=True)
        # Any free port: that of the killed start may still be taken.
        more = ("--dist-url", "auto", *more)
        command = [sys.executable, PROGRAM, *more, *self.options, f"train.output_dir={folder}"]
        with open(folder / "output.txt", "ab") as file:
            # A session of its own, so that a kill reaches all its processes and no other.
            return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)

    def undisturbed(self, folder: Path) -> float:
        """The seconds that the training took."""
        start = time.monotonic()
        process = self.start(folder)
        if process.wait() != 0:
            raise SystemExit(f"error: the undisturbed training failed: see {folder}/output.txt")
        return time.monotonic() - start

    def disturbed(self, folder: Path) -> list[str]:
        """How each start ended but the last, which came to the training's end."""
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
    """Its name, and when it was written."""
    path = folder / "last_checkpoint"
    return (path.read_text(), path.stat().st_mtime) if path.exists() else ("", 0.0)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True, help="as train_net.py takes it")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes, on CPUs as well")
    parser.add_argument("--kill-every", type=float, default=180, help="seconds, in the mean")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--output", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="key=value, for the config")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.output.exists():
        sys.exit(f"error: {args.output} is there already: give a folder that is not")
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
