"""How near a model comes to what the machine multiplies."""

import functools
import time

import torch
from benchmark_records import Case
from benchmark_subjects import build_detector
from benchmark_transformers import NAME as TRANSFORMERS

from lite_detr.analysis.flops import count_cost

# Rows and columns: enough for all cores, and soon done where the processor lacks the dtype.
SIDE = 1024


@functools.cache
def multiply_adds(subject: str, overrides: tuple[str, ...], size: tuple[int, int]) -> float | None:
    """Count those of one image; None for what :mod:`lite_detr.analysis.flops` cannot count."""
    if subject == TRANSFORMERS:
        return None
    return count_cost(build_detector(subject, overrides), *size).flops["total"]


class MatrixProduct:
    """A product of two square matrices, the best that a machine can do with multiply-adds."""

    def __init__(self, case: Case):
        self.device = case.device
        dtype = getattr(torch, case.dtype)
        self.matrices = torch.randn(2, SIDE, SIDE, device=case.device).to(dtype)

    def turn(self) -> float:
        """Multiply-adds a second of one product, after one that warms up."""
        for _ in range(2):
            self._wait()
            start = time.perf_counter()
            torch.mm(*self.matrices)
            self._wait()
            seconds = time.perf_counter() - start
        return SIDE**3 / seconds

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
