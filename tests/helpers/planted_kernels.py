"""The CUDA harness's own kernels: with faults in them, and of built-ins alone."""

import functools
from collections.abc import Callable

import cuda_harness
import torch
from cuda_harness_build import HARNESS, Source
from torch import Tensor

FILES = ("planted", "builtins")
Size = tuple[int, int, int]


@functools.cache
def _operator() -> Callable[..., None]:
    sources = [
        *(cuda_harness.device_code(HARNESS / f"{name}.cu", arch=90) for name in FILES),
        Source(HARNESS / "planted_operators.cpp"),
    ]
    cuda_harness.load("planted", sources)
    return torch.ops.lite_detr_harness_planted.run


def to_device(tensor: Tensor) -> Tensor:
    with cuda_harness.device_memory():
        return tensor.clone()


def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with cuda_harness.device_memory():
        return torch.empty(*shape, dtype=dtype)


def launch(
    kernel: str,
    input: Tensor,
    output: Tensor,
    grid: Size = (1, 1, 1),
    block: Size = (32, 1, 1),
    **shuffle: int,
) -> None:
    """With the ``argument`` and the ``width`` of a shuffle."""
    _operator()(kernel, input, output, grid, block, **shuffle)


def run(kernel: str, input: Tensor | None = None, size: int = 32, **options: Size | int) -> Tensor:
    """The output, of so many floats; the input is as many numbers from 0 on, if none is given."""
    if input is None:
        input = torch.arange(size, dtype=torch.float32)
    output = on_device(size)
    launch(kernel, to_device(input), output, **options)
    return output
