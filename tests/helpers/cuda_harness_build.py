"""Builds the libraries of `cuda_harness` into ``build/harness``, each object and library once.

Their names hold a hash of what they are made of, so that a source that changes is compiled again
and sessions that run side by side share what is there.
"""

import fcntl
import hashlib
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
HARNESS = ROOT / "tests" / "harness"
SHIM = HARNESS / "shim"
BUILD = ROOT / "build" / "harness"

PROCESSES = 2
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)

# -fno-strict-aliasing: kernels look at the same bytes as one type and another, as nvcc lets them.
# -fno-gnu-unique: what inline functions keep differs between the libraries of two architectures.
# -U_FORTIFY_SOURCE: its longjmp refuses to go to another stack.
COMPILE = (
    "-std=c++20 -O1 -fPIC -fno-strict-aliasing -fno-gnu-unique -U_FORTIFY_SOURCE "
    f"-Wall -Wno-unknown-pragmas -D_GLIBCXX_USE_CXX11_ABI={torch.compiled_with_cxx11_abi():d}"
).split()
# -Bsymbolic: no library takes functions of the same name from another. -z defs: they lack none.
LINK = "-shared -Wl,-Bsymbolic -Wl,-z,defs -Wl,-rpath,$ORIGIN".split()


class Source(NamedTuple):
    path: Path
    macros: tuple[str, ...] = ()


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def build(name: str, sources: Sequence[Source], libraries: Sequence[Path] = ()) -> Path:
    """A shared library of these sources, linked to PyTorch and to others that were built here."""
    objects = {_output(source.path.name, ".o", _ingredients(source)): source for source in sources}
    inputs = [*objects, *libraries]
    library = _output(f"lib{name}", ".so", [*LINK, *(path.name for path in inputs)])
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        # A session waits here for one that builds, and then finds what it needs. Closing unlocks.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            missing = {path: source for path, source in objects.items() if not path.exists()}
            _run({path: _compile_arguments(source) for path, source in missing.items()})
            name_in_library = f"-Wl,-soname,{library.name}"
            _run({library: [*LINK, name_in_library, *map(str, inputs), *_torch_libraries()]})
    return library


def _run(commands: Mapping[Path, Sequence[str]]) -> None:
    """Makes files by the compiler. A file that is there is whole."""

    def make(path: Path) -> str:
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = Path(folder) / path.name
            command = [*compiler(), *commands[path], "-o", str(made)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                return f"{shlex.join(command)}\n{result.stdout}{result.stderr}"
            made.rename(path)
            return ""

    with ThreadPoolExecutor(PROCESSES) as executor:
        errors = list(filter(None, executor.map(make, commands)))
    if errors:
        raise RuntimeError("the CUDA harness does not build:\n" + "\n".join(errors))


def _compile_arguments(source: Source) -> list[str]:
    return [
        *COMPILE,
        *(f"-D{macro}" for macro in source.macros),
        f"-I{SHIM}",
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),
        *("-x", "c++", "-c", str(source.path)),
    ]


def _torch_libraries() -> list[str]:
    return [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]


def _output(name: str, suffix: str, ingredients: Sequence[str]) -> Path:
    digest = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()
    return BUILD / f"{name}-{digest[:16]}{suffix}"


def _ingredients(source: Source) -> list[str]:
    files = _closure(source.path)
    return [_versions(), *COMPILE, *source.macros, *(path.read_text() for path in files)]


@cache
def _versions() -> str:
    command = [*compiler(), "--version"]
    return torch.__version__ + subprocess.run(command, capture_output=True, text=True).stdout


def _closure(source: Path) -> list[Path]:
    """A source and all files of the project that it includes."""
    found = {source: None}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        for name in INCLUDE.findall(path.read_text()):
            for folder in (path.parent, SHIM):
                included = (folder / name).resolve()
                if included.is_file():
                    if included not in found:
                        found[included] = None
                        waiting.append(included)
                    break
    return list(found)
