"""Compile CUDA kernels to inspect their machine code: ours, and those of Deformable DETR."""

import contextlib
import importlib.util
import os
import re
import shlex
import tarfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from machine_code import Kernel, read_kernels, run

from lite_detr.errors import LiteDetrError
from lite_detr.ops import nvrtc, nvrtc_kernels

ROOT = Path(__file__).resolve().parents[2]

# Prints a line for each layout: the kernel with its arguments, and the fields.
LAYOUTS = """
#include <cstdio>
#include "kernels/cuda/tuning.h"
using namespace lite_detr;
using namespace lite_detr::cuda;
void print(const char* kernel, const char* arguments, const Layout& layout) {
  std::printf("%s<%s> %d %d %d\\n", kernel, arguments, layout.lanes, layout.batch, layout.corners);
}
template <typename T>
void print(const char* msda, const char* separate, const char* shared) {
  constexpr int kHeadWidth = HEAD_WIDTH;
  print("msda_forward", msda, kMsdaForward<T, kHeadWidth>);
  print("msda_backward", msda, kMsdaBackward<T, kHeadWidth>);
  print("key_aware_forward", separate, kKeyAwareForward<T, kHeadWidth, false>);
  print("key_aware_forward", shared, kKeyAwareForward<T, kHeadWidth, true>);
  print("key_aware_backward", separate, kKeyAwareBackward<T, kHeadWidth, false>);
  print("key_aware_backward", shared, kKeyAwareBackward<T, kHeadWidth, true>);
}
int main() {
"""

# The original's kernels for heads as wide as ours, as its authors built them: 32-bit indices, and
# no check of the levels' sizes.
ORIGINAL = """
#include "cuda/ms_deform_im2col_cuda.cuh"
template <typename T>
struct Kernels {
  static constexpr auto forward = &ms_deformable_im2col_gpu_kernel<T, int, false>;
  template <unsigned kWidth>
  static constexpr auto narrow =
      &ms_deformable_col2im_gpu_kernel_shm_blocksize_aware_reduce_v1<T, int, false, kWidth>;
  template <unsigned kWidth>
  static constexpr auto wide =
      &ms_deformable_col2im_gpu_kernel_shm_blocksize_aware_reduce_v2<T, int, false, kWidth>;
};
template <typename T>
void use(void (*launch)(const void*)) {
  using K = Kernels<T>;
  const void* kernels[] = {
      (void*)K::forward, (void*)K::template narrow<16>, (void*)K::template narrow<32>,
      (void*)K::template wide<64>, (void*)K::template wide<128>, (void*)K::template wide<256>};
  for (const void* kernel : kernels) launch(kernel);
}
template void use<float>(void (*)(const void*));
template void use<double>(void (*)(const void*));
"""


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The module that setup.py builds with, which is not part of the package.
cuda_build = load_module(ROOT / "cuda_build.py")


@cache
def toolkit() -> "cuda_build.Toolkit":
    home = cuda_build.find_home()
    if home is None:
        raise LiteDetrError("nvcc is not on PATH and CUDA_HOME is not set; install a CUDA toolkit")
    version = re.search(
        r"release (\d+\.\d+)", cuda_build.output(home / "bin" / "nvcc", "--version")
    )
    if version is None:
        raise LiteDetrError(
            f"{home}/bin/nvcc is missing or does not run; CUDA_HOME names a toolkit"
        )
    return cuda_build.Toolkit(home, version[1])


@cache
def disassemblers() -> dict[str, Path]:
    """Find ``cuobjdump`` and ``nvdisasm``: the toolkit's, or else those that come with triton."""
    folders = [toolkit().home / "bin"]
    with contextlib.suppress(ImportError):
        import triton

        folders.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    tools = {}
    for name in ("cuobjdump", "nvdisasm"):
        found = [folder / name for folder in folders if (folder / name).exists()]
        if not found:
            raise LiteDetrError(f"{name} is in none of {', '.join(map(str, folders))}")
        tools[name] = found[0]
    return tools


def compile_kernels(
    source: Path, architecture: str, folder: Path, includes: Sequence[str] = ()
) -> list[Kernel]:
    """Compile the kernels of a source, as ``setup.py`` does."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

    number = architecture.replace(".", "")
    cubin = folder / f"{source.name}-{number}.cubin"
    headers = [part for flag in toolkit().header_flags() for part in ("-Xcompiler", flag)]
    log = run(
        toolkit().home / "bin" / "nvcc", "-std=c++20", "-O3", *COMMON_NVCC_FLAGS, *headers,
        *includes, "-cubin", f"-arch=sm_{number}", "-Xptxas", "-v", source, "-o", cubin,
    )  # fmt: skip
    return read_kernels(cubin, log, architecture, disassemblers())


def compile_ours(dtype: str, architecture: str, folder: Path) -> list[Kernel]:
    return compile_kernels(ROOT / "kernels" / "cuda" / f"{dtype}.cu", architecture, folder)


def compile_by_nvrtc(dtype: str, architecture: str, folder: Path) -> list[Kernel]:
    """Compile our kernels by NVRTC, as the package does at run time."""
    wanted = [
        kernel.program()
        for width in nvrtc_kernels.HEAD_WIDTHS
        if width >= 32 or dtype != "float64"
        for fused in (False, True)
        for attention, shared in (("msda", None), ("key_aware", True), ("key_aware", False))
        for kernel in nvrtc_kernels.kernels(attention, fused, getattr(torch, dtype), width, shared)
    ]
    source = '#include "cuda/key_aware.cuh"\n#include "cuda/msda.cuh"\n'
    program = nvrtc.Program(dtype, source, tuple(program.expressions[0] for program in wanted))
    target = f"sm_{architecture.replace('.', '')}"
    binary, log = nvrtc.compile_program(program, target, "--ptxas-options=-v")
    cubin = folder / f"{dtype}-{target}-nvrtc.cubin"
    cubin.write_bytes(binary.code)
    return read_kernels(cubin, log, architecture, disassemblers())


def compile_original(unpacked: Path, architecture: str, folder: Path) -> list[Kernel]:
    """Compile those in the folder ``csrc`` of the source package torch-ms-deform-attn."""
    from torch.utils.cpp_extension import include_paths

    # One file for each architecture, as several are compiled at a time.
    source = folder / f"original-{architecture}.cu"
    source.write_text(ORIGINAL)
    includes = [f"-I{path}" for path in (unpacked, unpacked / "csrc", *include_paths())]
    return compile_kernels(source, architecture, folder, includes)


def unpack(original: Path, folder: Path) -> Path:
    """Return the folder of the original's sources, given as a folder or as an archive."""
    if original.is_file() and tarfile.is_tarfile(original):
        with tarfile.open(original) as archive:
            archive.extractall(folder, filter="data")
        original = folder
    found = sorted(original.glob("**/csrc/cuda/ms_deform_im2col_cuda.cuh"))
    if not found:
        raise LiteDetrError(
            f"given {original}, without csrc/cuda/ms_deform_im2col_cuda.cuh; accepted is the "
            "source package torch-ms-deform-attn, or the folder that it unpacks to"
        )
    return found[0].parents[2]


def read_layouts(head_width: int, folder: Path) -> dict[str, dict[str, int]]:
    """Read the lanes, batch and corners of each kernel from ``kernels/cuda/tuning.h``."""
    source, program = folder / "layouts.cpp", folder / "layouts"
    calls = []
    for name in ("float", "double", "Float16", "BFloat16"):
        msda = f"{name}, {head_width}"
        calls.append(f'print<{name}>("{msda}", "{msda}, false", "{msda}, true");')
    source.write_text(LAYOUTS.replace("HEAD_WIDTH", str(head_width)) + "\n".join(calls) + "\n}\n")
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    headers = [f"-I{ROOT}", f"-I{toolkit().home}/include", *toolkit().header_flags()]
    run(*compiler, "-std=c++20", *headers, source, "-o", program)
    lines = re.findall(r"^(\S.*>) (\d+) (\d+) (\d+)$", run(program), re.MULTILINE)
    names = ("lanes", "batch", "corners")
    return {kernel: dict(zip(names, map(int, fields))) for kernel, *fields in lines}
