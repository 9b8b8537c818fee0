"""The program that times the operators, on very small maps."""

import json
import subprocess
import sys
import types
from types import SimpleNamespace

import calls
import operators
import pytest
import torch
from sampling_problems import needs_native

from lite_detr import ops

TINY = "--levels 6x8 3x4 --queries 5 --rounds 3 --seconds 0.01".split()
OPERATORS = ["ms_deform_attn", "key_aware_ms_deform_attn"]


KEYS = set(
    "operator shape dtype batch threads errors measure unit values ratios_to_native rounds calls"
    " ".split()
)


@pytest.fixture
def tool():
    threads = torch.get_num_threads()
    yield operators
    torch.set_num_threads(threads)


def run_main(tool, *arguments):
    tool.main([*TINY, *map(str, arguments)])


def fails(tool, capsys, *arguments):
    """Return the program's one line about an error."""
    with pytest.raises(SystemExit):
        run_main(tool, *arguments)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    return said.removeprefix("error: ")


@needs_native
def test_a_record_for_each_case(tool, monkeypatch, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    options = "--shapes decoder --batch 2 --threads 1 2 --dtype float32 bfloat16".split()
    run_main(tool, *options, "--json", figures)
    report = json.loads(figures.read_text())
    assert report["environment"]["torch"] == torch.__version__
    times = [record for record in report["records"] if record["unit"] == "ms"]
    cases = {
        tuple(record[name] for name in "operator shape dtype batch threads measure".split())
        for record in times
    }
    assert len(times) == len(cases) == 4 * 2 * 2 * 3
    assert all(set(record) == KEYS for record in report["records"])
    gathered = [record for record in report["records"] if record["unit"] == "GB/s"]
    assert len(gathered) == len(times) / 3
    for record in times:
        assert record["rounds"] == 3
        assert record["calls"] == dict.fromkeys(record["values"], 3)
        assert {"native", "pytorch"} <= set(record["values"])
        assert ("in steps" in record["values"]) == record["operator"].startswith("fused")
        for name, value in record["values"].items():
            assert value > 0
            ratio = value / record["values"]["native"]
            assert record["ratios_to_native"][name] == pytest.approx(ratio)
        # Results differ by rounding, unless they are compared with themselves.
        assert 0 < record["errors"]["native"] < {"float32": 3e-5, "bfloat16": 0.04}[record["dtype"]]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:6] == "operator shape dtype batch threads measure".split()
    assert len(lines) == 2 + len(report["records"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
def test_memory_is_that_of_one_call():
    held = []

    def call():
        held.append(torch.ones(2**22))  # 16 MiB
        return torch.ones(2**23).sum()  # 32 MiB, given back at the end

    peak = calls.peak_memory(call, "cpu")
    assert 47 * 2**20 < peak < 56 * 2**20


def test_the_encoder_has_a_query_for_each_token_and_looks_around_it(tool):
    levels = ((6, 8), (3, 4))
    problem = tool.make_problem("ms_deform_attn", levels, None, 2, torch.float32, "cpu")
    locations = problem.tensors["locations"]
    assert locations.shape == (2, 60, 8, 2, 4, 2)
    first, last = locations[:, 0].mean(), locations[:, 47].mean()
    assert first < 0.4 < 0.6 < last
    assert problem.tensors["weights"].sum((-1, -2)).sub(1).abs().max() < 1e-5
    # 60 queries, each with 8 points in 8 heads, of 4 rows of 128 bytes.
    assert problem.gathered_bytes() == 2 * 60 * 8 * 8 * 4 * 128


@needs_native
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_wrong_result_is_not_timed(tool, monkeypatch, capsys, operator):
    right = getattr(ops, operator)
    monkeypatch.setattr(tool.ops, operator, lambda *arguments: 1.001 * right(*arguments))
    said = fails(tool, capsys, "--operators", operator)
    assert said.startswith(f"{operator}: the output of native is 1.0e-03 off")


@needs_native
def test_a_wrong_gradient_is_not_timed(tool, monkeypatch, capsys):
    right = ops.ms_deform_attn

    def wrong(value, *arguments):
        """Add zero with a derivative that is not zero."""
        return right(value, *arguments) + (value.mean() - value.mean().detach())

    monkeypatch.setattr(tool.ops, "ms_deform_attn", wrong)
    said = fails(tool, capsys, "--operators", "ms_deform_attn")
    assert said.startswith("ms_deform_attn: the gradient of value of native is")


@pytest.mark.parametrize("size", ["8", "0x4", "axb", "8x"])
def test_sizes_that_are_none(tool, monkeypatch, capsys, size):
    with pytest.raises(SystemExit):
        run_main(tool, "--levels", size)
    assert f"given {size}, accepted is HEIGHTxWIDTH" in capsys.readouterr().err


class Clock:
    """A clock that only the timed functions advance."""

    def __init__(self):
        self.now = 0.0

    def takes(self, seconds):
        self.now += seconds


def test_rounds_fit_into_the_limit(tool, monkeypatch):
    clock = Clock()
    for module in (tool, calls):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    field = {
        name: SimpleNamespace(forward=lambda seconds=seconds: clock.takes(seconds))
        for name, seconds in {"native": 1.0, "pytorch": 3.0}.items()
    }
    for limit, rounds in ((100, 15), (41, 10), (1, 3)):
        times = tool.time_in_turns(field, "forward", "cpu", 15, limit)
        assert times == {"native": [[1.0]] * rounds, "pytorch": [[3.0]] * rounds}


class FakeGpu(types.ModuleType):
    """The part of torch.cuda that timing needs: a queue of tasks that take some time."""

    def __init__(self, host):
        super().__init__("cuda")
        self.host, self.now, self.flushed, self.waited = host, 0.0, 0, 0

    def add(self, seconds):
        # It waits for the host if it has nothing to do.
        self.waited += self.host.now > self.now
        self.now = max(self.now, self.host.now) + seconds

    def synchronize(self):
        self.host.now = max(self.host.now, self.now)

    def _sleep(self, cycles):
        self.waited = 0
        self.add(cycles / 2.5e9)

    def current_device(self):
        return 0

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=50)

    def Event(self, enable_timing):  # noqa: N802
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event

    def empty(self, size, dtype, device):
        assert (size, dtype, device) == (100, torch.uint8, "cuda")
        return SimpleNamespace(zero_=self.flush)

    def flush(self):
        self.flushed += 1
        self.add(5e-5)


@pytest.mark.parametrize("seconds, number", [(1e-5, 10), (3e-3, 3), (1.0, 1)])
def test_calls_on_a_gpu_are_timed_without_the_host(monkeypatch, seconds, number):
    """The host takes longer to launch a short kernel than the GPU to run it."""
    host = Clock()
    gpu = FakeGpu(host)
    monkeypatch.setattr(calls, "time", SimpleNamespace(perf_counter=lambda: host.now))
    fake = SimpleNamespace(cuda=gpu, empty=gpu.empty, uint8=torch.uint8)
    monkeypatch.setattr(calls, "torch", fake)

    def launch():
        host.takes(1e-4)
        gpu.add(seconds)

    times = calls.time_turn(launch, "cuda")
    assert times == pytest.approx([seconds] * number)
    assert gpu.flushed == number
    assert gpu.waited == 0
    assert host.now == gpu.now


@needs_native
def test_of_a_gpu_the_records_are_the_same(tool, monkeypatch, tmp_path):
    """Everything except the GPU itself, which the CPU replaces."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tool.ops, "backend", lambda device: "native")
    make_problem = tool.make_problem
    monkeypatch.setattr(tool, "make_problem", lambda *args: make_problem(*args[:-1], "cpu"))
    monkeypatch.setattr(tool, "time_turn", lambda call, device: [(call(), 0.001)[1] for _ in "ab"])
    monkeypatch.setattr(tool, "peak_memory", lambda function, device: 2**20)
    monkeypatch.setattr(tool, "environment", lambda device: {"gpu": device})
    check_gpu_report(tool, monkeypatch, tmp_path)


@pytest.mark.gpu
def test_on_a_gpu(tool, monkeypatch, tmp_path):
    environment = check_gpu_report(tool, monkeypatch, tmp_path)["environment"]
    assert environment["gpu"] == torch.cuda.get_device_name()
    assert environment["cuda"] == torch.version.cuda


def check_gpu_report(tool, monkeypatch, folder):
    figures = folder / "figures.json"
    options = "--device cuda --dtype float32 float16 --batch 1 3".split()
    run_main(tool, *options, "--json", figures)
    report = json.loads(figures.read_text())
    records = report["records"]
    assert len(records) == 4 * 2 * 2 * 2 * (3 + 1 + 2)
    for record in records:
        assert set(record) == KEYS
        assert record["threads"] is None
        assert all(value > 0 for value in record["values"].values())
        if record["unit"] == "ms":
            assert all(count >= record["rounds"] for count in record["calls"].values())
    return report


def test_environment_by_nvidia_smi(monkeypatch):
    properties = SimpleNamespace(name="A GPU", major=9, minor=0, uuid="abc")
    cuda = dict(get_device_properties=lambda device: properties, current_device=lambda: 0)
    cuda |= dict(_sleep=lambda cycles: None, synchronize=lambda: None)
    for name, replacement in cuda.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(calls.shutil, "which", lambda name: name)

    def run(command, **options):
        assert command[:2] == ["nvidia-smi", "--id=GPU-abc"]
        return subprocess.CompletedProcess(command, returncode, "580.1, 1980, [N/A]\n")

    monkeypatch.setattr(calls.subprocess, "run", run)
    found = {}
    for returncode in (0, 9):
        found[returncode] = calls.environment("cuda")
        assert found[returncode]["gpu"] == "A GPU"
        assert found[returncode]["compute capability"] == "9.0"
    assert found[0]["driver"] == "580.1" and found[9]["driver"] is None
    assert found[0]["clock, MHz"] == 1980 and found[0]["highest clock, MHz"] is None
    assert calls.environment("cpu").keys() == found[0].keys()


@pytest.mark.parametrize(
    "device, backend, available, message",
    [
        ("cpu", "pytorch", True, "no native operators for --device cpu; docs/kernels.md says"),
        ("cuda", "pytorch", True, "no native operators for --device cuda; docs/kernels.md says"),
        ("cuda", "native", False, "--device cuda needs a GPU, and PyTorch finds none"),
    ],
)
def test_without_native_operators_there_is_nothing_to_time(
    tool, monkeypatch, capsys, device, backend, available, message
):
    monkeypatch.setattr(tool.ops, "backend", lambda of: backend if of == device else "native")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert message in fails(tool, capsys, "--device", device)


def test_threads_are_of_the_cpu(tool, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(tool, "--device", "cuda", "--threads", 2)
    assert "--threads is for --device cpu" in capsys.readouterr().err


@needs_native
def test_a_long_error_is_one_line(tool, monkeypatch, capsys):
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMuch else.")

    monkeypatch.setattr(tool.ops, "ms_deform_attn", fail)
    expected = "ms_deform_attn, encoder, float32, batch 1: CUDA out of memory."
    assert fails(tool, capsys) == expected


@pytest.mark.parametrize("device, with_cuda", [("cpu", False), ("cuda", False), ("cuda", True)])
def test_the_other_package_takes_part_where_it_was_built_for_the_device(
    tool, monkeypatch, device, with_cuda
):
    other = types.ModuleType("torch_ms_deform_attn")
    other._C = SimpleNamespace(with_cuda=with_cuda)
    monkeypatch.setitem(sys.modules, "torch_ms_deform_attn", other)
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: True)
    assert tool.other_runs_on(torch.device(device)) == (device == "cpu" or with_cuda)
