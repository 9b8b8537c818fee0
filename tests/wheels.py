"""Install the wheel into fresh environments without a compiler, and use it; `make test-wheel` does.

    python tests/wheels.py dist/lite_detr-*.whl [3.12:2.10.0 3.13:newest ...]

Each environment, ``build/wheels/pyX.Y-torchV``, has a Python and a version of PyTorch. In it run
the operators' tests and a training step, with the native operators of the wheel. uv keeps what it
has downloaded, so that environments share files: each takes about 6 GB, most of them CUDA's.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from pythons import ROOT, interpreter

FOLDER = ROOT / "build" / "wheels"
# What installing needs of the system, beside Python: no compiler, assembler or linker.
TOOLS = "bash dirname env sh".split()
PACKAGES = ["setuptools<81", "pytest", "hypothesis"]
# Not the tests that start a compiler, or the kernels' harness, which needs one.
TESTS = """
tests/ops/test_checks.py tests/ops/test_ms_deform_attn.py tests/ops/test_fused.py
tests/ops/test_layouts.py tests/ops/test_tracing.py
""".split()
CHOICE = "native and not harness and not pytorch and not cuda and not inductor"
STEP = """
import torch
from detectron2.config import instantiate
from small_detectors import make_input, small_config
import lite_detr
from lite_detr import ops
assert ops.backend() == "native" and "site-packages" in lite_detr.__file__
torch.manual_seed(0)
for attention in ("msda", "kda"):
    model = instantiate(small_config("two_stage", "interleaved", attention))
    optimizer = torch.optim.AdamW(model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss = sum(model([make_input(64, 96, objects=3), make_input(48, 64)]).values())
    loss.backward()
    optimizer.step()
    pairs = list(zip(before, model.parameters()))
    assert loss.isfinite() and all(now.isfinite().all() for _, now in pairs)
    changed = sum(not torch.equal(old, now) for old, now in pairs)
    assert changed > 0.9 * len(pairs)
print("PyTorch", torch.__version__, torch.ops.lite_detr.cpu_capability())
"""


def uv() -> Path:
    """Return uv, of the version that `make lock` takes, in an environment of its own."""
    path = FOLDER / "uv" / "bin" / "uv"
    if not path.exists():
        version = next(
            word for word in (ROOT / "Makefile").read_text().split() if word.startswith("uv==")
        )
        run = dict(check=True, cwd=ROOT)
        subprocess.run([sys.executable, "-m", "venv", path.parents[1]], **run)
        subprocess.run([path.parent / "pip", "install", "--quiet", version], **run)
    return path


def tools() -> Path:
    """Make a folder with the few programs that environments may call."""
    folder = FOLDER / "tools"
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOOLS:
        link = folder / name
        if not link.exists():
            link.symlink_to(shutil.which(name))
    return folder


def check(wheel: Path, version: str, python: str, pytorch: str) -> tuple[bool, str]:
    """Install and run; return whether all went well, and a line about it."""
    venv = FOLDER / f"py{version}-torch{pytorch}"
    shutil.rmtree(venv, ignore_errors=True)
    environment = os.environ | {
        "PATH": f"{venv / 'bin'}{os.pathsep}{tools()}",
        "OMP_NUM_THREADS": "1",
        "UV_CACHE_DIR": str(FOLDER / "cache"),
        "UV_PYTHON_DOWNLOADS": "never",
        "PIP_NO_COMPILE": "1",
    }
    for name in ("CC", "CXX", "CUDA_HOME", "PYTHONPATH"):
        environment.pop(name, None)
    torch = "torch" if pytorch == "newest" else f"torch=={pytorch}"
    inside = venv / "bin" / "python"
    steps = {
        "environment": [uv(), "venv", "--quiet", "--seed", "--python", python, venv],
        "PyTorch": [
            *(uv(), "pip", "install", "--quiet", "--python", inside),
            *(torch, "torchvision", *PACKAGES),
        ],
        "wheel": [inside, "-m", "pip", "install", "--quiet", wheel],
        "Detectron2": [ROOT / "tools" / "install_detectron2.sh", inside],
        "training step": [inside, "-W", "ignore", "-c", STEP],
        "tests": [
            *(inside, "-m", "pytest", "-p", "no:cacheprovider", "-o", "pythonpath=tests/helpers"),
            *("-k", CHOICE, *TESTS),
        ],
    }
    said = []
    for name, command in steps.items():
        start = time.monotonic()
        settings = environment
        if name == "training step":
            settings = environment | {"PYTHONPATH": str(ROOT / "tests" / "helpers")}
        result = subprocess.run(
            list(map(str, command)), cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True
        )
        print(result.stdout, end="", flush=True)
        last = (result.stdout.splitlines() or ["no output"])[-1]
        if result.returncode != 0:
            return False, f"{name} failed: {last}"
        if name in ("training step", "tests"):
            said.append(f"{last} ({time.monotonic() - start:.0f}s)")
    return True, "; ".join(said)


def main(wheel: str, *environments: str) -> int:
    lines, failed = [], False
    for environment in environments:
        version, _, pytorch = environment.partition(":")
        python = interpreter(version)
        passed, line = True, "skipped: not found"
        if python:
            passed, line = check(Path(wheel).resolve(), version, python, pytorch)
        failed |= not passed
        lines.append(f"Python {version}, PyTorch {pytorch}: {line}")
        print(lines[-1], flush=True)
    print("", *lines, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
