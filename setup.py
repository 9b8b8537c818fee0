"""Build the native operators, if possible; everything else is in pyproject.toml."""

import os
import re
import shlex
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
# For cuda_build: a build by pip does not look for modules beside this file.
sys.path.insert(0, str(ROOT))

HINT = (
    "lite-detr: native operators not built ({reason}); the slower PyTorch ones will run. To build "
    "them, see docs/kernels.md"
)
CUDA_HINT = (
    "lite-detr: CUDA kernels not built ({reason}); on GPUs they will be compiled at first use. To "
    "build them, see docs/kernels.md"
)


# PyTorch from this version on has a stable ABI: extensions built with one run with the others.
STABLE_SINCE = (2, 10)


def first_line(error: Exception) -> str:
    # Some errors have no message.
    return (str(error) or type(error).__name__).splitlines()[0]


def native_extension(toolkit=None) -> Extension:
    """Return the CPU kernels and, given a toolkit (``cuda_build.Toolkit``), the CUDA kernels."""
    from torch.torch_version import __version__
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    stable = toolkit is None and __version__ >= STABLE_SINCE
    create = CppExtension if toolkit is None else CUDAExtension
    kernels = (path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*"))
    sources = sorted(
        str(path)
        for path in kernels
        if path.suffix in (".cpp", ".cu") and (toolkit is not None or "cuda" not in path.parts)
    )
    headers = [] if toolkit is None else toolkit.header_flags()
    flags = {
        # -fno-...: NaN stays NaN with both, and compilers can vectorise more loops.
        # The environment's flags come last, and override these.
        "cxx": [
            *"-O3 -g0 -fno-math-errno -fno-trapping-math -Wno-psabi".split(),
            *(stable_flags() if stable else ["-fopenmp"]),
            *headers,
            *os.environ.get("CFLAGS", "").split(),
        ]
    }
    if toolkit is not None:
        # nvcc passes the host compiler flags through a shell. PyTorch would add the architectures,
        # but not if any flag contains "arch", as the name of a folder may.
        host = [part for flag in headers for part in ("-Xcompiler", shlex.quote(flag))]
        architectures = toolkit.architecture_flags()
        # As it takes the names of GPUs, times ten; nvcc would split the flag at commas.
        ptx = sorted(set(re.findall(r"code=compute_(\d+)", " ".join(architectures))), key=int)
        named = "+".join(f"{number}0" for number in ptx)
        flags["nvcc"] = ["-O3", *host, *architectures, f"-DLITE_DETR_PTX={named}"]
    extension = create("lite_detr._C", sources, extra_compile_args=flags)
    if stable:
        extension.libraries = ["torch_cpu"]
        # Conversions of 16-bit numbers, which older systems' shared library lacks.
        extension.extra_link_args = ["-lgcc"]
    else:
        # As in PyTorch: without it at::parallel_for is a loop on one thread.
        extension.extra_link_args = ["-fopenmp"]
    return extension


def stable_flags() -> list[str]:
    """Return the compiler's flags for LibTorch's stable ABI, with what its first version has."""
    major, minor = STABLE_SINCE
    version = major << 56 | minor << 48
    return [f"-DTORCH_TARGET_VERSION={version:#018x}", "-fvisibility=hidden"]


def build_options() -> dict:
    """Return the extension and the command that builds it; nothing if unwanted or impossible."""
    if os.environ.get("LITE_DETR_NO_EXT", "0") != "0":
        return {}
    try:
        from cuda_build import CannotBuild, find_toolkit
    except ImportError as error:
        reason = f"{first_line(error)}; pip needs --no-build-isolation to see torch"
        print(HINT.format(reason=reason), file=sys.stderr)
        return {}

    toolkit, no_cuda_reason = None, ""
    try:
        toolkit = find_toolkit()
    except CannotBuild as error:
        no_cuda_reason = first_line(error)
    if toolkit is not None:
        # PyTorch reads it when the next line imports.
        os.environ["CUDA_HOME"] = str(toolkit.home)
    from setuptools.command.bdist_wheel import bdist_wheel
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuild(BuildExtension):
        """If the build fails, the package has no extension, and the PyTorch operators run."""

        def run(self) -> None:
            try:
                super().run()
            # Whatever the compiler, linker or PyTorch raises: the package must install.
            except Exception as error:
                print(HINT.format(reason=first_line(error)), file=sys.stderr)
                self.extensions = []

        def build_extensions(self) -> None:
            """Build with the CUDA kernels, or without them if that fails."""
            reason = no_cuda_reason
            try:
                if toolkit is not None:
                    self.redefine(toolkit)
                super().build_extensions()
            except Exception as error:
                if toolkit is None:
                    raise
                reason = f"{first_line(error)}, with CUDA {toolkit.version} in {toolkit.home}"
                self.redefine(None)
                super().build_extensions()
            if reason:
                print(CUDA_HINT.format(reason=reason), file=sys.stderr)

        def redefine(self, toolkit) -> None:
            # The object stays the same, as setuptools has recorded where its file goes.
            vars(self.extensions[0]).update(vars(native_extension(toolkit)))

    class Wheel(bdist_wheel):
        """A wheel for any Python, as the extension is a plain library, and for this platform."""

        def get_tag(self) -> tuple[str, str, str]:
            built = self.get_finalized_command("build_ext").extensions
            return "py3", "none", super().get_tag()[2] if built else "any"

    return {
        "ext_modules": [native_extension()],
        "cmdclass": {
            "build_ext": OptionalBuild.with_options(no_python_abi_suffix=True),
            "bdist_wheel": Wheel,
        },
    }


if __name__ == "__main__":
    setup(**build_options())
