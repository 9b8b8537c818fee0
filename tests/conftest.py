"""The order of files, the marker ``gpu``, and the counts of fuzz tests at pytest's end."""

import functools
from pathlib import Path

import pytest
from fuzzing import Fuzzer

TESTS = Path(__file__).parent
# They start first: a process that began one of them last would keep all others waiting.
LONGEST = """
ops/test_cuda_harness.py ops/test_cuda_kernels.py checkpoint/test_golden.py test_train_net.py
test_detectron2_programs.py checkpoint/test_programs.py engine/test_resume.py engine/test_launch.py
ops/test_tracing.py engine/test_processes.py configs/test_zoo_smoke.py export/test_onnx.py
tools/kernels/test_report.py test_collect_env.py test_package.py checkpoint/test_transformers.py
""".split()


def pytest_collection_modifyitems(items):
    order = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@functools.cache
def no_gpu_reason() -> str:
    """What is missing; empty where nothing is."""
    import torch

    from lite_detr import ops

    missing = []
    if not torch.cuda.is_available():
        missing.append("a CUDA device (PyTorch finds none)")
    if ops.backend("cuda") == "pytorch":
        missing.append("CUDA kernels (see docs/kernels.md)")
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
