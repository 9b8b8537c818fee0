"""What a report of a problem needs to say about the machine and the installation.

    python -m lite_detr.collect_env

Where ``import lite_detr`` itself fails, run this file: ``python -P collect_env.py``. No part of the
report depends on another: what fails is named in its place.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

# A checkout has projects/lite_detr/ in it.
CHECKOUT = Path(__file__).resolve().parents[2]
# By the names under which pip installs them.
PACKAGES = (
    "sal-detectron2 fvcore iopath numpy omegaconf pycocotools scipy setuptools torch torchvision "
    "timm safetensors transformers onnx onnxruntime onnxruntime-gpu"
).split()
VARIABLES = (
    "LITE_DETR_CPU_CAPABILITY LITE_DETR_NO_EXT FORCE_CUDA TORCH_CUDA_ARCH_LIST CUDA_HOME "
    "CUDA_VISIBLE_DEVICES OMP_NUM_THREADS DETECTRON2_DATASETS"
).split()


def collect_env_info() -> str:
    """The report: our part as a table, and Detectron2's below it."""
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
    for name, tell in parts.items():
        text = attempt(tell).replace("\n", "\n" + " " * width)
        lines.append(f"{name:{width}}{text}")
    return "\n".join([*lines, "", attempt(surroundings)])


def attempt(tell: Callable[[], str]) -> str:
    """What a part of the report says, or why it cannot."""
    try:
        return tell()
    # A report of what is broken ends at nothing that is.
    except Exception as error:
        return f"cannot be told: {type(error).__name__}: {error}"


def package() -> str:
    import lite_detr

    return f"{lite_detr.__version__} @{Path(lite_detr.__file__).parent}"


def commit() -> str:
    """That of the checkout, with ``-dirty`` where files differ from it."""
    if not (CHECKOUT / ".git").exists():
        return "none, as this is no checkout"
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

    if ops.backend("cuda") != "native":
        return ops.backend("cuda")
    listed = map(int, torch.ops.lite_detr.cuda_architectures().split(","))
    gpus = ", ".join(f"{number // 100}.{number % 100 // 10}" for number in listed)
    return f"native, for GPUs of compute capability {gpus}"


def extension() -> str:
    """Where it is, and the whole error where it does not load."""
    from lite_detr.ops import native

    spec = importlib.util.find_spec("lite_detr._C")
    path = spec.origin if spec else "none"
    return f"{path}, not loaded: {native.WHY_NOT}" if native.WHY_NOT else path


def variables() -> str:
    """Those that change what is built and what runs."""
    given = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return "\n".join(given) or "nothing set that lite_detr reads"


def packages() -> str:
    """Without importing them, as a broken one would not let itself be imported."""
    return "\n".join(f"{name} {version(name)}" for name in PACKAGES)


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def surroundings() -> str:
    """Detectron2's report of Python, PyTorch, compilers and GPUs; PyTorch's own where it fails."""
    try:
        from detectron2.utils.collect_env import collect_env_info

        return collect_env_info()
    except Exception as error:
        return f"Detectron2's report failed: {type(error).__name__}: {error}\n\n" + attempt(pytorch)


def pytorch() -> str:
    from torch.utils.collect_env import get_pretty_env_info

    return get_pretty_env_info()


if __name__ == "__main__":
    print(collect_env_info())
