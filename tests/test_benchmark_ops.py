"""The tool that times the operators, on maps so small that it is done at once."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from sampling_problems import needs_native

from lite_detr import ops

pytestmark = needs_native
TINY = "--levels 6x8 3x4 --queries 5 --rounds 3 --seconds 0.01".split()
OPERATORS = ["ms_deform_attn", "key_aware_ms_deform_attn"]


@pytest.fixture
def tool():
    path = Path(__file__).parents[1] / "tools" / "benchmark_ops.py"
    spec = importlib.util.spec_from_file_location("benchmark_ops", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def run_main(tool, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark_ops.py", *TINY, *map(str, arguments)])
    tool.main()


def test_a_record_for_each_case(tool, monkeypatch, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    options = "--batch 1 2 --threads 1 2 --dtype float32 bfloat16".split()
    run_main(tool, monkeypatch, *options, "--json", figures)
    report = json.loads(figures.read_text())
    assert report["environment"]["torch"] == torch.__version__
    times = [record for record in report["records"] if record["unit"] == "ms"]
    cases = {
        tuple(record[name] for name in "operator shape dtype batch threads measure".split())
        for record in times
    }
    assert len(times) == len(cases) == 2 * 2 * 2 * 2 * 2 * 3
    for record in times:
        assert record["rounds"] == 3
        assert {"native", "pytorch"} <= set(record["values"])
        for name, value in record["values"].items():
            assert value > 0
            ratio = value / record["values"]["native"]
            assert record["ratios_to_native"][name] == pytest.approx(ratio)
        # Results differ by rounding; were they compared with themselves, they would not.
        assert 0 < record["errors"]["native"] < {"float32": 3e-5, "bfloat16": 0.04}[record["dtype"]]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:6] == "operator shape dtype batch threads measure".split()
    assert len(lines) == 2 + len(report["records"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
def test_memory_is_that_of_one_call(tool):
    held = []

    def call():
        held.append(torch.ones(2**22))  # 16 MiB
        return torch.ones(2**23).sum()  # 32 MiB, given back at the end

    peak = tool.peak_memory(call, "cpu")
    assert 47 * 2**20 < peak < 56 * 2**20


def test_the_encoder_has_a_query_for_each_token_and_looks_around_it(tool):
    levels = ((6, 8), (3, 4))
    problem = tool.make_problem("ms_deform_attn", levels, None, 2, torch.float32, "cpu")
    locations = problem.tensors["locations"]
    assert locations.shape == (2, 60, 8, 2, 4, 2)
    first, last = locations[:, 0].mean(), locations[:, 47].mean()
    assert first < 0.4 < 0.6 < last
    assert problem.tensors["weights"].sum((-1, -2)).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_wrong_result_is_not_timed(tool, monkeypatch, operator):
    right = getattr(ops, operator)
    monkeypatch.setattr(tool.ops, operator, lambda *arguments: 1.001 * right(*arguments))
    with pytest.raises(SystemExit) as exit:
        run_main(tool, monkeypatch, "--operators", operator)
    assert str(exit.value).startswith(f"error: {operator}: the output of native is 1.0e-03 off")


def test_a_wrong_gradient_is_not_timed(tool, monkeypatch):
    right = ops.ms_deform_attn

    def wrong(value, *arguments):
        """Adds zero, whose derivative is not."""
        return right(value, *arguments) + (value.mean() - value.mean().detach())

    monkeypatch.setattr(tool.ops, "ms_deform_attn", wrong)
    with pytest.raises(SystemExit) as exit:
        run_main(tool, monkeypatch, "--operators", "ms_deform_attn")
    assert str(exit.value).startswith("error: ms_deform_attn: the gradient of value of native is")


@pytest.mark.parametrize("size", ["8", "0x4", "axb", "8x"])
def test_sizes_that_are_none(tool, monkeypatch, capsys, size):
    with pytest.raises(SystemExit):
        run_main(tool, monkeypatch, "--levels", size)
    assert f"given {size}, accepted is HEIGHTxWIDTH" in capsys.readouterr().err


def test_without_the_native_operators_there_is_nothing_to_time(tool, monkeypatch):
    monkeypatch.setattr(tool.ops, "backend", lambda: "pytorch")
    with pytest.raises(SystemExit) as exit:
        run_main(tool, monkeypatch)
    assert "docs/kernels.md" in str(exit.value)
