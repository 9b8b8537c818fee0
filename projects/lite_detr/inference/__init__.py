"""Detectors that are only to be run: the same results, sooner."""

from ..errors import OptimizationError
from .memory import keep_freed_memory
from .optimize import DTYPES, optimize_for_inference, optimize_for_program

__all__ = [
    "DTYPES",
    "OptimizationError",
    "keep_freed_memory",
    "optimize_for_inference",
    "optimize_for_program",
]
