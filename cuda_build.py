"""Find what the build of the CUDA kernels needs: a toolkit, the GPUs to build for, and headers."""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

# The default of the toolkit's installer.
USUAL_HOME = Path("/usr/local/cuda")
# Built for if there is no GPU: the generations since Turing.
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# The driver compiles PTX for GPUs that no binary is for: this one for those between the others,
# such as 11.0, and that of the newest for even newer ones.
PTX_OF_OLDER = "8.0"


class CannotBuild(Exception):
    """The CUDA kernels cannot be built; the message is the reason, in one line."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that fits this PyTorch."""

    home: Path
    version: str

    def header_flags(self) -> list[str]:
        """Return the flags for headers that a toolkit may lack, in the pip packages of PyTorch.

        They come after all other folders, so that headers of two versions do not mix.
        """
        spec = importlib.util.find_spec("nvidia")
        roots = [Path(root) for root in spec.submodule_search_locations] if spec else []
        folders = [folder for root in roots for folder in sorted(root.glob("*/include"))]
        # Since CUDA 13 one folder, cu13, holds a whole version; before, each library had its own.
        others = re.compile(rf"cu(?!{self.version.split('.')[0]}$)\d+")
        return [
            f"-idirafter{folder}" for folder in folders if not others.fullmatch(folder.parent.name)
        ]

    def architecture_flags(self) -> list[str]:
        """Return flags for TORCH_CUDA_ARCH_LIST, the visible GPUs, or all that nvcc knows."""
        given = os.environ.get("TORCH_CUDA_ARCH_LIST")
        if given == "native" and not torch.cuda.is_available():
            raise CannotBuild("TORCH_CUDA_ARCH_LIST is native, but no GPU is visible")
        if given or torch.cuda.is_available():
            # Private: PyTorch has no public function that reads TORCH_CUDA_ARCH_LIST.
            from torch.utils.cpp_extension import _get_cuda_arch_flags

            return _get_cuda_arch_flags()
        listed = output(self.home / "bin" / "nvcc", "--list-gpu-arch")
        known = set(re.findall(r"^compute_(\d+)$", listed, re.MULTILINE))
        numbers = [name.replace(".", "") for name in ARCHITECTURES]
        numbers = [number for number in numbers if number in known]
        if not numbers:
            raise CannotBuild(f"nvcc --list-gpu-arch names none of {', '.join(ARCHITECTURES)}")
        flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
        older = PTX_OF_OLDER.replace(".", "")
        ptx = dict.fromkeys([number for number in numbers if number == older] + numbers[-1:])
        return flags + [f"-gencode=arch=compute_{number},code=compute_{number}" for number in ptx]


def find_toolkit() -> Toolkit | None:
    """Return the toolkit to build with; None if neither a GPU nor the environment asks for one.

    Raises:
        CannotBuild: there is no toolkit that fits this PyTorch.
    """
    asked = None
    for request in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        if os.environ.get(request, "0") not in ("", "0"):
            asked = f"{request} is set"
    if torch.version.cuda is None:
        if asked:
            raise CannotBuild(f"{asked}, but PyTorch {torch.__version__} is built without CUDA")
        return None
    if asked is None and torch.cuda.is_available():
        asked = "a GPU is visible"
    home = find_home()
    if asked is None:
        if home is None:
            return None
        raise CannotBuild(f"nvcc is in {home}, but no GPU is visible and FORCE_CUDA is not set")
    major = torch.version.cuda.split(".")[0]
    needed = f"PyTorch {torch.__version__} needs the toolkit of CUDA {major}"
    if home is None:
        raise CannotBuild(f"{asked}, but nvcc is not on PATH and CUDA_HOME is not set; {needed}")
    nvcc = home / "bin" / "nvcc"
    release = re.search(r"release (\d+\.\d+)", output(nvcc, "--version"))
    if release is None:
        raise CannotBuild(f"{asked}, but {nvcc} is missing or does not run; {needed}")
    if release[1].split(".")[0] != major:
        raise CannotBuild(f"{asked}, but {nvcc} is of CUDA {release[1]}; {needed}")
    return Toolkit(home, release[1])


def find_home() -> Path | None:
    """Return the toolkit's folder: CUDA_HOME, or that of the nvcc on PATH, or the default."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return USUAL_HOME if (USUAL_HOME / "bin" / "nvcc").exists() else None
    # This may be a script that calls another nvcc, which tells its own folder.
    top = re.search(r"^#\$ TOP=(.+)$", output(nvcc, "--dryrun", "-x", "cu", os.devnull), re.M)
    return Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1]


def output(*command: str | Path) -> str:
    """Return what a program prints; nothing if it cannot be started."""
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return run.stdout + run.stderr
