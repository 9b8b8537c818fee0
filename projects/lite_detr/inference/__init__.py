"""Detectors that are only to be run: the same results, faster."""

from ..errors import OptimizationError
from .optimize import DTYPES, keep_freed_memory, optimize_for_inference, optimize_for_program

__all__ = [
    "DTYPES",
    "OptimizationError",
    "keep_freed_memory",
    "optimize_for_inference",
    "optimize_for_program",
]
