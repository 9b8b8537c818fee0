"""Builds the native operators, if it can; everything else stands in pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import setup

HINT = (
    "lite-detr: native operators not built ({reason}); the slower PyTorch ones will run. To build "
    "them, see docs/kernels.md"
)


def build_options() -> dict:
    """The extension and the command that builds it; nothing where it is not wanted or possible."""
    if os.environ.get("LITE_DETR_NO_EXT", "0") != "0":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print(HINT.format(reason="pip needs --no-build-isolation to see torch"), file=sys.stderr)
        return {}

    class OptionalBuild(BuildExtension):
        """A failed build leaves a package without the extension, as the PyTorch path serves."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                # Some errors have no message.
                reason = (str(error) or type(error).__name__).splitlines()[0]
                print(HINT.format(reason=reason), file=sys.stderr)
                self.extensions = []

    root = Path(__file__).parent
    extension = CppExtension(
        "lite_detr._C",
        sorted(str(path.relative_to(root)) for path in (root / "kernels").rglob("*.cpp")),
        extra_compile_args={
            # -fno-...: neither lets a NaN pass for a number; both let loops become vector code.
            # Without OpenMP, as PyTorch has it, at::parallel_for is a loop on one thread.
            # The environment's flags come last, so that they count.
            "cxx": [
                *"-O3 -g0 -fopenmp".split(),
                *"-fno-math-errno -fno-trapping-math -Wno-psabi".split(),
                *os.environ.get("CFLAGS", "").split(),
            ]
        },
        extra_link_args=["-fopenmp"],
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": OptionalBuild.with_options(no_python_abi_suffix=True)},
    }


setup(**build_options())
