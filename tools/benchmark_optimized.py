"""Detectors as `lite_detr.optimize_for_inference` makes them, wholly or by one of its steps."""

import copy
import ctypes

import torch
from benchmark_records import Case

from lite_detr.inference import keep_freed_memory, optimize
from lite_detr.inference.memory import M_MMAP_MAX, M_TRIM_THRESHOLD
from lite_detr.modeling.detector import Detector

OFF, ON, MEMORY = "off", "on", "freed-memory"
STEPS = {
    "norms": optimize.fold_backbone_norms,
    "activations": optimize.overwrite_activations,
    "channels-last": optimize.use_channels_last,
    "geometry": optimize.keep_geometry,
}
CHOICES = (OFF, ON, *STEPS, MEMORY)

# What glibc's limits have grown to after some large blocks: mapped blocks, their size, the end.
M_MMAP_THRESHOLD = -3
USUAL = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26}


def optimized(model: Detector, case: Case) -> Detector:
    """The model of a case; on CPUs, what `set_memory` does comes to it."""
    if case.optimized == ON:
        return optimize.optimize_for_inference(model, getattr(torch, case.dtype))
    if case.optimized in STEPS:
        model = copy.deepcopy(model).eval().requires_grad_(False)
        STEPS[case.optimized](model)
    return model


def has_own_dtype(case: Case) -> bool:
    """Whether the weights are in the case's dtype, so that no autocast is needed."""
    return case.optimized == ON


def set_memory(case: Case) -> None:
    """Lets the process keep freed memory, or hand it back as it is used to.

    Cases of both kinds take turns in one process.
    """
    if case.device != "cpu":
        return
    if case.optimized in (ON, MEMORY):
        keep_freed_memory()
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for parameter, value in USUAL.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)
