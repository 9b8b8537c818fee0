"""Kernels compiled at run time: by the real NVRTC, and launched in the harness by a fake driver."""

import contextlib
import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import types

import cuda_harness
import pytest
import torch
import torch.nn.functional as F
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
    "float64": (torch.float64, 17, 4),
    "wide": (torch.float32, 200, None),
    "points": (torch.float32, 32, 2),
    "boxes": (torch.float16, 64, 4),
}


@needs_nvrtc
@cuda_harness.needs_harness
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("keys", ["none", "shared", "separate"])
def test_python_packs_and_launches_as_the_extension_does(driver, keys, case):
    """The same bits, forward and backward, from the same kernels."""
    dtype, channels, coordinates = CASES[case]
    exact = torch.promote_types(dtype, torch.float32)
    problem = make_problem(channels=channels, queries=16, heads=1, shared_key=keys == "shared")
    problem = cast(problem, dtype, exact) | {"exact": exact}
    # Rows of wider ones, which are read where they lie, or copied from an odd address.
    shift = {"locations": 4, "points": 1}.get(case, 0)
    problem = {
        name: F.pad(entry, (shift, 8 - shift))[..., shift : shift + channels]
        if shift and name in ("value", "key")
        else entry
        for name, entry in problem.items()
    }
    if keys == "shared":
        problem["key"] = problem["value"]
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


@needs_native
def test_python_defines_the_operators_as_the_extension_does():
    for name, function in nvrtc_operators.OPERATORS.items():
        built = getattr(torch.ops.lite_detr, name).default._schema
        ours = torch._C.parse_schema(name + torch.library.infer_schema(function, mutates_args=()))
        arguments, results = (
            [
                [(part.name, str(part.type)) for part in schema.arguments]
                for schema in (ours, built)
            ],
            [[str(part.type) for part in schema.returns] for schema in (ours, built)],
        )
        assert arguments[0] == arguments[1] and results[0] == results[1]


def fresh_driver(monkeypatch, **functions):
    """Replace the driver by one that takes everything, and does nothing."""
    idle = dict(
        CUstream=int,
        cuDriverGetVersion=lambda: (0, 13000),
        cuCtxGetCurrent=lambda: (0, 1),
        cuModuleLoadData=lambda code: (0, code),
        cuModuleGetFunction=lambda module, name: (0, name),
    )
    fake, real = types.SimpleNamespace(**(idle | functions)), nvrtc.bindings()[1]
    monkeypatch.setattr(nvrtc, "bindings", lambda: (fake, real))


KERNEL = nvrtc_kernels.Kernel("msda_forward", torch.float32, "Offsets", 32)


def compiled(monkeypatch):
    """Record the targets of what is compiled from now on."""
    targets = []

    def compile_program(program, architecture, *options, by=nvrtc.compile_program):
        targets.append(architecture)
        return by(program, architecture, *options)

    monkeypatch.setattr(nvrtc, "compile_program", compile_program)
    return targets


@needs_nvrtc
def test_a_kernel_is_compiled_once_for_all_processes_and_again_if_its_file_is_damaged(
    gpu, monkeypatch, tmp_path
):
    fresh_driver(monkeypatch)
    targets = compiled(monkeypatch)
    monkeypatch.setenv("LITE_DETR_CACHE", str(tmp_path / "new"))
    first = nvrtc_kernels.load(KERNEL, 0)
    (path,) = (tmp_path / "new").iterdir()
    for content, times in ((None, 1), (b"", 2), (path.read_bytes()[:-1], 3), (b"x" * 99, 4)):
        if content is not None:
            path.write_bytes(content)
        forget()
        assert nvrtc_kernels.load(KERNEL, 0) == first
        assert targets == ["sm_90"] * times
    # Another driver, PyTorch or source is another file.
    environment = nvrtc.environment()
    monkeypatch.setattr(nvrtc, "environment", lambda: (*environment, "changed"))
    forget()
    nvrtc_kernels.load(KERNEL, 0)
    assert len(targets) == 5 and len(list(path.parent.iterdir())) == 2


@needs_nvrtc
@pytest.mark.parametrize("place", ["a file", "below/a/file"])
def test_without_a_folder_that_can_be_written_to_kernels_are_compiled(
    gpu, monkeypatch, tmp_path, place
):
    fresh_driver(monkeypatch)
    (tmp_path / place.split("/")[0]).write_text("not a folder")
    monkeypatch.setenv("LITE_DETR_CACHE", str(tmp_path / place))
    assert nvrtc_kernels.load(KERNEL, 0).threads == 256


def use(caplog):
    """Return whether an operator would run with kernels on the GPU, and the warnings."""
    value = types.SimpleNamespace(
        device=torch.device("cuda:0"), dim=lambda: 4, dtype=torch.float32, shape=(1, 5, 8, 32)
    )
    runs = native.runs_on(value.device) and native.has_kernels(value, "msda", fused=True)
    return runs, [record.getMessage() for record in caplog.records]


@needs_nvrtc
def test_a_kernel_that_does_not_compile_is_one_warning_and_the_pytorch_form(
    gpu, monkeypatch, tmp_path, caplog
):
    fresh_driver(monkeypatch)
    sources = tmp_path / "kernels"
    shutil.copytree(nvrtc.SOURCES, sources)
    file = sources / "cuda" / "weights.cuh"
    file.write_text(file.read_text() + "\nint broken = unknown;\n")
    monkeypatch.setattr(nvrtc, "SOURCES", sources)
    monkeypatch.setenv("LITE_DETR_CACHE", str(tmp_path / "cubins"))
    for _ in range(3):
        runs, (warning,) = use(caplog)
        assert not runs and ops.backend("cuda:0") == "pytorch"
    assert warning.startswith("kernels/cuda/msda.cuh does not compile for sm_90: ")
    assert re.search(r"weights\.cuh\(\d+\): error: .*\"unknown\" is undefined", warning)
    assert "\n" not in warning and "PyTorch operators run on cuda:0" in warning


@needs_nvrtc
def test_a_driver_that_refuses_a_kernel_is_one_warning_and_the_pytorch_form(
    gpu, monkeypatch, caplog
):
    status = pytest.importorskip("cuda.bindings.driver").CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU
    fresh_driver(monkeypatch, cuModuleLoadData=lambda code: (status, None))
    runs, (warning,) = use(caplog)
    assert not runs
    assert "does not load kernels/cuda/msda.cuh for sm_90: CUDA error: CUDA_ERROR_NO_BIN" in warning


@needs_nvrtc
@pytest.mark.parametrize("listed", ["", "800,900/"])
def test_a_gpu_that_was_not_built_for(gpu, monkeypatch, caplog, listed):
    """NVRTC compiles for it, if it can; it is said once that the extension does not fit."""
    fresh_driver(monkeypatch)
    monkeypatch.setattr(native, "DEVICES", ("cpu", "cuda") if listed else ("cpu",))
    built = types.SimpleNamespace(cuda_architectures=lambda: listed)
    monkeypatch.setattr(torch.ops, "lite_detr", built)
    registered = []
    monkeypatch.setattr(nvrtc_operators, "register", lambda define: registered.append(define))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    targets = compiled(monkeypatch)
    monkeypatch.setenv("LITE_DETR_CACHE", "/dev/null")
    for _ in range(2):
        assert ops.backend("cuda:0") == "nvrtc"
        runs, warnings = use(caplog)
        assert runs and len(warnings) == bool(listed)
    # Forward and backward.
    assert targets == ["sm_120", "sm_120"]
    assert registered == [False] * bool(listed)
    if listed:
        assert "built for GPUs of compute capability 8.0, 9.0 and not for 12.0" in warnings[0]
        forget()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert ops.backend("cuda:0") == "native"


@pytest.mark.parametrize(
    "capability, problem",
    [((7, 0), "compute capability 7.0, and the kernels need 7.5"), (None, "pip install 'cuda-bi")],
)
def test_where_nothing_can_be_compiled_one_warning_says_why(
    gpu, monkeypatch, caplog, capability, problem
):
    if capability is None:
        # As if it were not installed.
        nvrtc.bindings.cache_clear()
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    else:
        fresh_driver(monkeypatch)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for _ in range(2):
        runs, (warning,) = use(caplog)
        assert not runs and ops.backend("cuda:0") == "pytorch"
    assert problem in warning and "docs/kernels.md" in warning


@pytest.mark.parametrize(
    "listed, covered",
    [
        ("", ""),
        ("800,900/", "8.0 8.6 8.9 9.0"),
        ("750,860,1200", "7.5 8.6 8.9 12.0"),
        ("900/900", "9.0 10.0 12.0"),
        ("750,800,1200/800+1200", "7.5 8.0 8.6 8.9 9.0 10.0 12.0"),
    ],
)
def test_which_gpus_an_extension_runs_on(listed, covered):
    gpus = "7.5 8.0 8.6 8.9 9.0 10.0 12.0".split()
    found = [gpu for gpu in gpus if native.covers(listed, tuple(map(int, gpu.split("."))))]
    assert found == covered.split()


@needs_nvrtc
@pytest.mark.parametrize("number", [75, 80, 86, 89, 90, 100, 120])
def test_no_architecture_spills(number):
    """One kernel; tests/tools/kernels compares all of them with nvcc's."""
    kernel = KERNEL._replace(name="msda_backward", dtype=torch.bfloat16)
    _, log = nvrtc.compile_program(kernel.program(), f"sm_{number}", "--ptxas-options=-v")
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) == [("0", "0")] * 2


@needs_nvrtc
@pytest.mark.parametrize("capability, target", [((8, 0), "sm_80"), ((99, 0), "compute_")])
def test_a_gpu_newer_than_nvrtc_gets_ptx(capability, target):
    target = nvrtc.target(capability)
    binary, _ = nvrtc.compile_program(KERNEL.program(), target)
    if capability == (8, 0):
        assert target == "sm_80" and binary.code.startswith(b"\x7fELF")
    else:
        assert target.startswith("compute_") and b".version" in binary.code


def test_torch_compile_calls_the_compiler_of_kernels_while_it_traces(monkeypatch):
    calls = []

    def compile_kernels(*kernel):
        # Nothing that a graph could hold.
        with open(os.devnull) as file:
            calls.append((kernel, file.name))
        return True

    monkeypatch.setattr(native, "backend", lambda device: "nvrtc")
    monkeypatch.setattr(native, "compile_kernels", compile_kernels)
    device = torch.device("cuda:0")

    def function(x):
        runs = native.runs_on(device) and native.compiles(device, "msda", x.dtype, x.shape[0])
        return x + 1 if runs else x

    graph = torch.compile(function, fullgraph=True, backend="eager")
    for _ in range(2):
        assert graph(torch.zeros(2)).tolist() == [1, 1]
    assert calls == [((0, "msda", torch.float32, 2), os.devnull)]
