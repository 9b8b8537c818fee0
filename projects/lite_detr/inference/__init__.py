"""Detectors that are only to be run: the same results, sooner."""

from .memory import keep_freed_memory
from .optimize import optimize_for_inference

__all__ = ["keep_freed_memory", "optimize_for_inference"]
