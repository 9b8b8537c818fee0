"""Tests marked ``gpu`` are skipped without a GPU; counts of fuzz tests are printed at the end."""

import functools

import pytest
from fuzzing import Fuzzer


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


@pytest.fixture
def fuzz(record_property):
    """Tries many inputs; see ``tests/helpers/fuzzing.py``."""
    return Fuzzer(lambda line: record_property("fuzz", line))


def pytest_terminal_summary(terminalreporter):
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    lines = [text for report in reports for name, text in report.user_properties if name == "fuzz"]
    if lines:
        terminalreporter.section("fuzz tests")
        for line in sorted(set(lines)):
            terminalreporter.line(line)
