"""Describe the machine and the installation, for a report of a problem.

    python -m lite_detr.collect_env

If ``import lite_detr`` itself fails, run this file: ``python -P collect_env.py``. The parts of the
report are independent: one that fails is replaced by its error.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

# A checkout contains projects/lite_detr/.
CHECKOUT = Path(__file__).resolve().parents[2]
# By the names under which pip installs them.
PACKAGES = (
    "sal-detectron2 fvcore iopath numpy omegaconf pycocotools scipy setuptools torch torchvision "
    "cuda-bindings timm safetensors transformers onnx onnxruntime onnxruntime-gpu"
).split()
VARIABLES = (
    "LITE_DETR_CPU_CAPABILITY LITE_DETR_CACHE LITE_DETR_NO_EXT FORCE_CUDA TORCH_CUDA_ARCH_LIST "
    "CUDA_HOME CUDA_VISIBLE_DEVICES OMP_NUM_THREADS DETECTRON2_DATASETS"
).split()


def collect_env_info() -> str:
    """Return the report: our part as a table, and Detectron2's below it."""
    parts = {
        "lite_detr": package,
        "commit": commit,
        "operators on cpu": cpu_operators,
        "operators on cuda": cuda_operators,
        "extension": extension,
        "environment": variables,
        "packages": packages,
    }
    width = max(map(len, parts)) + 2
    lines = []
    for name, describe in parts.items():
        text = attempt(describe).replace("\n", "\n" + " " * width)
        lines.append(f"{name:{width}}{text}")
    return "\n".join([*lines, "", attempt(system)])


def attempt(describe: Callable[[], str]) -> str:
    """Return a part of the report, or the error that it raises."""
    try:
        return describe()
    # Nothing that is broken may end a report of what is broken.
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def package() -> str:
    import lite_detr

    return f"{lite_detr.__version__} @{Path(lite_detr.__file__).parent}"


def commit() -> str:
    """Return the checkout's commit, with ``-dirty`` if files differ from it."""
    if not (CHECKOUT / ".git").exists():
        return "none, as this is not a checkout"
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"]
    run = subprocess.run(command, capture_output=True, text=True)
    return run.stdout.strip() or run.stderr.strip()


def cpu_operators() -> str:
    import torch

    from lite_detr import ops

    if ops.backend("cpu") != "native":
        return ops.backend("cpu")
    return f"native, instruction set {torch.ops.lite_detr.cpu_capability()}"


def cuda_operators() -> str:
    import torch

    from lite_detr import ops
    from lite_detr.ops import native, nvrtc

    backend = ops.backend("cuda")
    if backend == "nvrtc":
        return f"nvrtc, compiled at first use and kept in {nvrtc.cache_folder()}"
    if backend != "native":
        return backend
    gpus = native.name_gpus(torch.ops.lite_detr.cuda_architectures())
    return f"native, for GPUs of compute capability {gpus}"


def extension() -> str:
    """Return where the extension is, and the whole error if it does not load."""
    from lite_detr.ops import native

    spec = importlib.util.find_spec("lite_detr._C")
    path = spec.origin if spec else "none"
    return f"{path}, not loaded: {native.MISSING_REASON}" if native.MISSING_REASON else path


def variables() -> str:
    """Return the environment variables that change what is built and what runs."""
    given = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return "\n".join(given) or "no variable set that lite_detr reads"


def packages() -> str:
    """Return the versions of packages without importing them, as one may be broken."""
    return "\n".join(f"{name} {version(name)}" for name in PACKAGES)


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def system() -> str:
    """Return Detectron2's report of Python, PyTorch, compilers and GPUs, or else PyTorch's."""
    try:
        from detectron2.utils.collect_env import collect_env_info

        return collect_env_info()
    # It runs compilers and GPU tools, which fail in many ways.
    except Exception as error:
        return f"Detectron2's report failed: {type(error).__name__}: {error}\n\n" + attempt(pytorch)


def pytorch() -> str:
    from torch.utils.collect_env import get_pretty_env_info

    return get_pretty_env_info()


if __name__ == "__main__":
    print(collect_env_info())
