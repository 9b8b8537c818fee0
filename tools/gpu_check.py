#!/usr/bin/env python
"""Check everything that only a GPU can show, in ten minutes; each check has its own time limit.

gpu_check.py                          # or make gpu-check
gpu_check.py --only device operators  # some of the checks
gpu_check.py --device cpu             # try the program itself where there is no GPU

Needs PyTorch, and nvcc for the extension, which is built meanwhile for this GPU in build/gpu_check.
What needs Detectron2 is skipped without it. Results go into a JSON file as they come, so that a run
that is cut off tells what it found. Exits with status 1 if a check fails.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu_check"
BUILT = BUILD / "lib"
# A line that a check prints for its figures, which go into the file.
FIGURE = "figure: "


class Check(NamedTuple):
    """A check: a function of `gpu_checks`, or a program of the project.

    Args:
        seconds: its limit.
        form: ``nvrtc``, whose kernels are compiled at run time, or ``built``, the extension's.
        command: what runs instead of the function; words in braces are filled in.
        needs: modules and programs without which it is skipped.
        gpu: whether it makes sense on a GPU only.
    """

    name: str
    seconds: int
    form: str = "nvrtc"
    command: str = ""
    needs: tuple[str, ...] = ()
    gpu: bool = False


DETECTORS = (
    "tools/benchmarks/detectors.py --config-file dino/lite_dino_r50_h3l1_2p1x3_36ep.py "
    "dino/dino_r50_4scale_36ep.py --tasks inference training --dtype float32 bfloat16 --compile "
    "off on --device {device} --rounds 3 --json {json}"
)
TURNS = (
    "tools/benchmarks/operators.py --device {device} {sizes} --dtype float32 bfloat16 --rounds 3 "
    "--seconds {seconds} --json {json} --operators "
)
# The operators that the roofline knows, and what it calls them.
KINDS = {"ms_deform_attn": "msda", "key_aware_ms_deform_attn": "key-aware, shared"}
SPEED = TURNS.replace("{seconds}", "1") + " ".join(KINDS)
# Beside the steps that they replace.
FUSED = TURNS.replace("{seconds}", "0.3") + "fused_ms_deform_attn fused_key_aware_ms_deform_attn"
# What a benchmark measures, on a GPU and to try it on a CPU.
SIZES = {"cuda": "--batch 1 16", "cpu": "--batch 1 --levels 12x16 6x8 --queries 30"}
DIGITS = (
    "train_net.py --config-file digits/lite_dino_efficientnet_lite0.py train.amp.enabled=True "
    "train.device={device} train.max_iter=1000 train.output_dir={folder}/digits"
)
CHECKS = (
    Check("device", 30),
    Check("operators", 60),
    Check("gradients", 40),
    Check("streams", 20, gpu=True),
    Check("graphs", 20, gpu=True),
    Check("compiled", 60),
    Check("memcheck", 60, needs=("compute-sanitizer",), gpu=True),
    Check("speed", 90, command=SPEED, needs=("tqdm",)),
    Check("fused", 40, command=FUSED, needs=("tqdm",)),
    Check("operators", 40, form="built"),
    Check("gradients", 20, form="built"),
    Check("streams", 20, form="built", gpu=True),
    Check("graphs", 20, form="built", gpu=True),
    Check("speed", 80, form="built", command=SPEED, needs=("tqdm",)),
    Check("detectors", 150, command=DETECTORS, needs=("detectron2",), gpu=True),
    Check("digits", 180, command=DIGITS, needs=("detectron2",), gpu=True),
)


class Report:
    """The results, in a file that is complete after each of them."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.start = path, time.monotonic()
        self.content = {"device": device, "python": platform.python_version(), "checks": []}

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def add(self, check: Check, status: str, seconds: float = 0.0, **found: object) -> None:
        name = f"{check.name} ({check.form})"
        entry = {"check": name, "status": status, "seconds": round(seconds, 1), **found}
        self.content["checks"].append(entry)
        self.save()
        why = found.get("reason", "")
        print(f"{self.seconds():4.0f} s  {name:24} {status:8} {why}", flush=True)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
            json.dump(self.content, file, indent=1)
        os.replace(file.name, self.path)

    def lacks_device(self) -> bool:
        checks = self.content["checks"]
        return any(e["status"] != "passed" and e["check"].startswith("device") for e in checks)

    def failed(self) -> bool:
        return any(entry["status"] in ("failed", "too long") for entry in self.content["checks"])


def missing(needs: Sequence[str]) -> str:
    """Return the first module or program that is not there; empty if all are."""
    for name in needs:
        if not importlib.util.find_spec(name.replace("-", "_")) and not shutil.which(name):
            return name
    return ""


def run(
    command: Sequence[str], seconds: float, environment: dict[str, str]
) -> tuple[int | None, str]:
    """Run a command; return its status, None if it took too long, and what it printed."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(seconds)
        # Also what the program has started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        output.seek(0)
        return status, output.read()


def start_build() -> subprocess.Popen | None:
    """Build the extension for the visible GPU in the background; None without nvcc."""
    if not shutil.which("nvcc") and not os.environ.get("CUDA_HOME"):
        return None
    BUILD.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "setup.py", "-q", "build"]
    command += ["--build-base", str(BUILD), "--build-lib", str(BUILT)]
    with (BUILD / "log.txt").open("w") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"FORCE_CUDA": "1"},
        )


def wait_for_build(build: subprocess.Popen | None, seconds: float) -> str:
    """Return why the extension could not be built; empty if it was."""
    if build is None:
        return "nvcc is not on PATH and CUDA_HOME is not set"
    try:
        build.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(build.pid, signal.SIGKILL)
        return f"the build took longer; see {BUILD}/log.txt"
    if build.returncode or not (BUILT / "lite_detr" / "_C.so").exists():
        return f"the build failed; see {BUILD}/log.txt"
    return ""


def command_of(check: Check, device: str, folder: Path) -> list[str]:
    if not check.command:
        program = [sys.executable, str(ROOT / "tools" / "gpu_checks.py")]
        program += [check.name, "--device", device, "--form", check.form]
        if check.name != "memcheck":
            return program
        return ["compute-sanitizer", "--error-exitcode", "3", *program]
    text = check.command
    if text == DETECTORS and not missing(["transformers"]):
        text += " --competitors"
    json_file, sizes = folder / "records.json", SIZES[device]
    words = text.format(device=device, json=json_file, folder=folder, sizes=sizes).split()
    form = ["--form", check.form, "--program"]
    return [sys.executable, str(ROOT / "tools" / "gpu_checks.py"), *form, *words]


def run_check(check: Check, device: str, seconds: float, report: Report) -> None:
    """Run a check in a process of its own, and report what it found."""
    package = BUILT if check.form == "built" else ROOT / "projects"
    paths = [package, ROOT / "tools", ROOT / "tools" / "benchmarks", ROOT / "tools" / "kernels"]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = command_of(check, device, folder)
        variables = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONUNBUFFERED": "1"}
        status, output = run(command, seconds, variables)
        found: dict[str, object] = {}
        if (folder / "records.json").exists():
            found["records"] = json.loads((folder / "records.json").read_text())["records"]
    took = time.monotonic() - start
    lines = output.strip().splitlines()
    figures = [json.loads(line.removeprefix(FIGURE)) for line in lines if line.startswith(FIGURE)]
    if figures:
        found["figures"] = figures
    if status == 0:
        return report.add(check, "passed", took, **found)
    reason = f"stopped after {seconds:.0f} s" if status is None else (lines or ["nothing"])[-1]
    state = "too long" if status is None else "failed"
    return report.add(check, state, took, reason=reason, output=lines[-60:], **found)


def print_roofline(report: Report) -> None:
    """Print the operators' times beside the least that the GPU's parts could take."""
    sys.path[:0] = [str(ROOT / "projects"), str(ROOT / "tools" / "kernels")]
    import roofline

    encoder = roofline.Encoder(roofline.ENCODER)
    rows = []
    for entry in report.content["checks"]:
        for record in entry.get("records", []) if entry["check"].startswith("speed") else []:
            direction = record["measure"]
            if direction not in roofline.PASSES or record["shape"] != "encoder":
                continue
            size = roofline.SIZES[record["dtype"]]
            costs = encoder.cost(record["batch"], KINDS[record["operator"]], direction, size)
            parts = roofline.times(costs, roofline.GPUS["H100 SXM"])
            bound = max(parts, key=parts.get)
            measured = 1e3 * record["values"]["native"]
            name = (entry["check"], record["operator"], direction, record["dtype"])
            rows.append((*map(str, name), record["batch"], measured, parts[bound], bound))
    report.content["roofline"] = rows
    report.save()
    if rows:
        print("\nmeasured, and at least by an H100's published rates, in microseconds:")
    for *name, measured, least, bound in rows:
        print("  ".join(map(str, name)), f"{measured:.0f}, {least:.0f} by {bound}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, names = parser.add_argument, list(dict.fromkeys(check.name for check in CHECKS))
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--only", nargs="+", choices=names, default=names, help="default: all")
    add("--seconds", type=float, default=570, help="for everything, default: 570")
    add("--json", type=Path, default=BUILD / "report.json", help="default: in build/gpu_check")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    report = Report(args.json, args.device)
    chosen = [check for check in CHECKS if check.name in args.only]
    wants_build = args.device == "cuda" and any(check.form == "built" for check in chosen)
    build, no_build = start_build() if wants_build else None, None
    for check in chosen:
        rest = args.seconds - report.seconds()
        reason = ""
        if check.gpu and args.device == "cpu":
            reason = "needs a GPU"
        elif absent := missing(check.needs):
            reason = f"needs {absent}"
        elif check.form == "built" and args.device == "cpu":
            reason = "is the same as the others on a CPU"
        elif report.lacks_device():
            reason = "the device does not work"
        elif rest < 5:
            reason = f"no time is left of {args.seconds:.0f} s"
        elif check.form == "built":
            if no_build is None:
                no_build = wait_for_build(build, min(rest, 240))
            reason = no_build
        if reason:
            report.add(check, "skipped", reason=reason)
        else:
            run_check(check, args.device, min(check.seconds, rest), report)
    if build is not None and build.poll() is None:
        os.killpg(build.pid, signal.SIGKILL)
    if args.device == "cuda":
        print_roofline(report)
    print(f"\n{args.json} has the figures")
    sys.exit(report.failed())


if __name__ == "__main__":
    main()
