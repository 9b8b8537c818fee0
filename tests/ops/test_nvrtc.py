"""Kernels compiled at run time: by the real NVRTC, and launched in the harness by a fake driver."""

import contextlib
import ctypes
import functools
import re
import subprocess
import types

import cuda_harness
import pytest
import torch
from sampling_problems import cast, make_grad_output, make_problem, needs_native, transform

from lite_detr import ops
from lite_detr.ops import native, nvrtc, nvrtc_kernels, nvrtc_operators
from lite_detr.ops.sampling import flatten, level_tensors

CAPABILITY = (9, 0)


@functools.cache
def missing_reason():
    try:
        nvrtc.environment()
    except nvrtc.Unavailable as error:
        return str(error)
    return ""


needs_nvrtc = pytest.mark.skipif(bool(missing_reason()), reason=missing_reason())


class Driver:
    """CUDA's driver as cuda-bindings has it, for one GPU: the harness."""

    CUstream = staticmethod(int)

    def __init__(self):
        self.launches = []
        library = cuda_harness.build(
            "by_name",
            [
                cuda_harness.Source(cuda_harness.HARNESS / "launch_by_name.cpp"),
                *(
                    cuda_harness.device_code(path, 90)
                    for path in sorted(cuda_harness.KERNELS.glob("cuda/float*.cu"))
                ),
                cuda_harness.device_code(cuda_harness.KERNELS / "cuda" / "bfloat16.cu", 90),
            ],
            [cuda_harness._runtime()],
        )
        self.launch = ctypes.CDLL(str(library)).lite_detr_harness_launch
        self.launch.restype = ctypes.c_char_p

    def cuDriverGetVersion(self):
        return 0, 13000

    def cuCtxGetCurrent(self):
        return 0, 1

    def cuModuleLoadData(self, code):
        assert code.startswith(b"\x7fELF")
        return 0, code

    def cuModuleGetFunction(self, module, name):
        # Only symbols of the module.
        assert name + b"\0" in module
        return 0, name.decode()

    def cuLaunchKernel(self, function, *sizes_and_pointers):
        *sizes, shared, stream, pointers, extra = sizes_and_pointers
        assert (shared, stream, extra) == (0, 7, 0)
        demangled = subprocess.run(["c++filt", function], capture_output=True, text=True).stdout
        kernel, number, points = re.search(
            r"cuda::(\w+)<(?:lite_detr::)?(\w+), lite_detr::(\w+)<", demangled
        ).groups()
        argument = ctypes.c_void_p.from_address(pointers).value
        names = (name.encode() for name in (kernel, number, points))
        cuda_harness.counters()
        problem = self.launch(*names, ctypes.c_void_p(argument)).decode()
        assert not problem, problem
        (counted,) = cuda_harness.counters()
        # As the extension's C++ launches it.
        assert counted["blocks"] == sizes[0] * sizes[1] * sizes[2]
        assert (counted["threads"], 1, 1) == tuple(sizes[3:])
        self.launches.append(demangled.strip())
        return (0,)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("cubins")


@pytest.fixture
def gpu(monkeypatch, kept):
    """A machine with a GPU of compute capability 9.0, whose memory is the harness's."""
    monkeypatch.setenv("LITE_DETR_CACHE", str(kept))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITY)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    stream = types.SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    forget()
    yield
    forget()


def forget():
    """Forget what was chosen and loaded, as in a new process."""
    native.FAILED.clear()
    for function in (native.cuda_backend, native.compile_kernels, nvrtc_kernels.load):
        function.cache_clear()


@pytest.fixture
def driver(monkeypatch, gpu):
    fake = Driver()
    _, real = nvrtc.bindings()
    monkeypatch.setattr(nvrtc, "bindings", lambda: (fake, real))
    return fake


def fused_tensors(problem, coordinates):
    """Turn a problem's locations into reference points and offsets of any place."""
    batch, queries, _, levels = problem["locations"].shape[:4]
    references = torch.rand(
        (batch, queries, levels, coordinates), generator=torch.Generator().manual_seed(2)
    )
    offsets = 4 * problem["locations"] - 2
    return references.to(problem["exact"]), offsets.to(problem["value"].dtype)


CASES = {
    "locations": (torch.float32, 32, None),
    "padded": (torch.bfloat16, 17, None),
    "float64": (torch.float64, 32, None),
    "wide": (torch.float32, 200, None),
    "points": (torch.float32, 32, 2),
    "boxes": (torch.float16, 64, 4),
    "float64 boxes": (torch.float64, 17, 4),
}


@needs_nvrtc
@cuda_harness.needs_harness
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("keys", ["none", "shared", "separate"])
def test_python_packs_and_launches_as_the_extension_does(driver, keys, case):
    """The same bits, forward and backward, from the same kernels."""
    dtype, channels, coordinates = CASES[case]
    exact = torch.promote_types(dtype, torch.float32)
    problem = make_problem(channels=channels, queries=5, heads=3, shared_key=keys == "shared")
    problem = cast(problem, dtype, exact) | {"exact": exact}
    attention = "ms_deform_attn" if keys == "none" else "key_aware_ms_deform_attn"
    with cuda_harness.device_memory():
        inputs = transform(problem, cuda_harness.to_device)
        key = None if keys == "shared" else inputs["key"]
        start = [inputs["value"]] if keys == "none" else [inputs["query"], key, inputs["value"]]
        weights = [inputs["weights"]] if keys == "none" else []
        if coordinates is None:
            places = [*level_tensors(problem["sizes"]), inputs["locations"]]
        else:
            attention = f"fused_{attention}"
            tensors = fused_tensors(problem, coordinates)
            places = [flatten(problem["sizes"]), *map(cuda_harness.to_device, tensors)]
        arguments = [*start, *places, *weights]
        grad_output = cuda_harness.to_device(make_grad_output(problem, dtype))
        results = []
        for operators in (nvrtc_operators.OPERATORS, Built()):
            found = operators[attention](*arguments)
            saved = found if isinstance(found, tuple) else (found,)
            if attention == "ms_deform_attn":
                saved = ()
            after = () if coordinates is None else (True,)
            grads = operators[f"{attention}_backward"](grad_output, *arguments, *saved, *after)
            results.append([*(found if isinstance(found, tuple) else (found,)), *grads])
    for ours, built in zip(*results, strict=True):
        assert ours.shape == built.shape and ours.dtype == built.dtype
        assert torch.equal(ours, built)
    assert len(driver.launches) == 2


class Built:
    """The operators in the harness by name, as the extension registers them."""

    def __getitem__(self, name):
        return cuda_harness.operator(name, arch=90)
