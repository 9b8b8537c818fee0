"""Tests that are marked ``gpu`` run where there is a GPU, and an extension with kernels for it."""

import functools

import pytest


@functools.cache
def no_gpu_reason() -> str:
    """What is missing; empty where nothing is."""
    import torch

    from lite_detr import ops

    missing = []
    if not torch.cuda.is_available():
        missing.append("a CUDA device (PyTorch finds none)")
    if ops.backend("cuda") != "native":
        missing.append("CUDA kernels (the extension has none: see docs/kernels.md)")
    return f"needs {' and '.join(missing)}" if missing else ""


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and no_gpu_reason():
        pytest.skip(no_gpu_reason())
