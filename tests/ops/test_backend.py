"""Which operators run, the warning if they are missing, and the memory that they take."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sampling_problems import LEAVES, make_problem, needs_native, run_python
from torch.torch_version import TorchVersion

from lite_detr import ops
from lite_detr.ops.native import DEVICES

PACKAGE = Path(ops.__file__).parents[1]
USE = """
import logging
logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
from sampling_problems import LEAVES, make_problem, run_with_gradients
from lite_detr import ops
for _ in range(2):
    for attention in LEAVES:
        # "native" here means whatever lite_detr.ops chooses.
        result = run_with_gradients(attention, "native", make_problem())
        expected = run_with_gradients(attention, "pytorch", make_problem())
        assert all((result[name] - expected[name]).abs().max() < 1e-12 for name in expected)
print(ops.backend())
"""


def copy_of_the_operators(folder):
    """Copy the package without its extension."""
    target = folder / "lite_detr"
    shutil.copytree(PACKAGE / "ops", target / "ops")
    return target


def test_without_the_extension_one_warning_says_so(tmp_path):
    run = run_python(USE, copy_of_the_operators(tmp_path))
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["pytorch"]
    (warning,) = run.stderr.splitlines()
    assert warning.startswith("WARNING lite_detr ")
    assert "installed without them" in warning
    assert "docs/kernels.md" in warning


def test_an_extension_that_does_not_load_is_as_good_as_none(tmp_path):
    """For example, one that was built for another PyTorch."""
    package = copy_of_the_operators(tmp_path)
    (package / "_C.so").write_bytes(b"not a library")
    run = run_python(USE, package)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["pytorch"]
    (warning,) = run.stderr.splitlines()
    assert "_C.so" in warning
    # The loader's reason, and not only that it failed.
    assert "Could not load this library" not in warning
    assert "docs/kernels.md" in warning


@needs_native
def test_with_the_extension_nothing_is_said():
    run = run_python(USE)
    assert run.returncode == 0, run.stderr
    assert (run.stdout.split(), run.stderr) == (["native"], "")


@needs_native
@pytest.mark.parametrize("attention", LEAVES)
def test_native_is_what_runs(attention):
    problem = make_problem()
    levels = torch.tensor(problem["sizes"]), torch.tensor([0, 20, 26, 30])
    tensors = [problem[name] for name in LEAVES[attention]]
    arguments = (*tensors[:-1], *levels, tensors[-1])
    if attention == "ms_deform_attn":
        arguments = (problem["value"], *levels, problem["locations"], problem["weights"])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        getattr(ops, attention)(*arguments)
    names = {event.key for event in profile.key_averages()}
    assert f"lite_detr::{attention}" in names
    assert not any("grid_sampler" in name for name in names)


# The peak is the system's count of the process's resident pages, which can be reset. Freed blocks
# that malloc keeps would hide what comes after, and are returned before.
PEAK_MEMORY = """
import ctypes
from pathlib import Path
import torch
from sampling_problems import cast, make_problem, run_with_gradients

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

sizes = ((40, 40), (20, 20), (10, 10), (5, 5))
problem = cast(make_problem(sizes, 4, 32, 1, 2125, 8, shared_key=True), torch.float32)
grad_output = torch.randn(1, 2125, 256)
small = cast(make_problem(channels=32), torch.float32)
for form in ("native", "pytorch"):
    run_with_gradients("key_aware_ms_deform_attn", form, small)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    results = run_with_gradients("key_aware_ms_deform_attn", form, problem, grad_output)
    print(resident("VmHWM") - before)
    del results
"""


def test_other_devices_get_the_pytorch_form():
    assert ops.backend(torch.device("meta")) == "pytorch"


@needs_native
def test_cuda_has_the_kernels_of_the_extension_or_of_nvrtc():
    """All operators or none, according to PyTorch's list of registrations."""
    names = [fused + name for name in LEAVES for fused in ("", "fused_")]
    registered = {
        "\nCUDA: registered" in torch._C._dispatch_dump(f"lite_detr::{name}{suffix}")
        for name in names
        for suffix in ("", "_backward")
    }
    assert registered == {torch.version.cuda is not None}


@needs_native
@pytest.mark.skipif("cuda" in DEVICES, reason="with CUDA kernels it is for one PyTorch")
@pytest.mark.skipif(TorchVersion(torch.__version__) < (2, 10), reason="has no stable ABI")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_extension_takes_only_c_functions_from_pytorch():
    """One of C++ would tie it to the PyTorch that it was built with."""
    command = ["nm", "-D", "--undefined-only", PACKAGE / "_C.so"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    names = re.findall(r" U (\w+)", run.stdout)
    assert "torch_parallel_for" in names
    # Those of the standard library are C++.
    assert not [name for name in names if re.match("_Z.*(2at|3c10|5torch|8pybind11)", name)]


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
def test_key_aware_attention_takes_a_tenth_of_the_memory():
    """Forward and backward, including the output and the gradients: 2125 queries."""
    run = run_python(PEAK_MEMORY)
    assert run.returncode == 0, run.stderr
    native, pytorch = map(int, run.stdout.split())
    assert 0 < native < pytorch / 10
