"""The check for a GPU: what it reports, and that its own checks can pass and fail without one."""

import json
import sys

import gpu_check
import gpu_checks
import operators as benchmark
import pytest
import roofline
import torch

from lite_detr import ops
from lite_detr.ops import nvrtc

PROGRAMS = {
    "sound": "print('noise\\nfigure: {\"speed\": 3}')",
    "broken": "print('before'); raise ValueError('that is wrong')",
    "slow": "import time; print('figure: {\"half\": 1}', flush=True); time.sleep(60)",
    "later": "",
}


def test_what_becomes_of_each_check_is_in_the_file(monkeypatch, tmp_path, capsys):
    checks = [gpu_check.Check(name, 1) for name in PROGRAMS]
    checks.insert(2, gpu_check.Check("foreign", 1, needs=("sys", "no_such_module")))
    checks.insert(2, gpu_check.Check("graphic", 1, gpu=True))
    monkeypatch.setattr(gpu_check, "CHECKS", checks)

    def command_of(check, device, folder):
        # What came before is there when the next check starts.
        done = json.loads(path.read_text())["checks"] if path.exists() else []
        assert len(done) == checks.index(check)
        return [sys.executable, "-c", PROGRAMS[check.name]]

    monkeypatch.setattr(gpu_check, "command_of", command_of)
    path = tmp_path / "new" / "report.json"
    with pytest.raises(SystemExit) as end:
        gpu_check.main(["--device", "cpu", "--json", str(path)])
    assert end.value.code
    entries = {entry["check"]: entry for entry in json.loads(path.read_text())["checks"]}
    found = {name.split()[0]: entry["status"] for name, entry in entries.items()}
    assert found == dict(
        sound="passed", broken="failed", graphic="skipped", foreign="skipped", slow="too long",
        later="passed",
    )  # fmt: skip
    assert entries["sound (nvrtc)"]["figures"] == [{"speed": 3}]
    assert entries["slow (nvrtc)"]["figures"] == [{"half": 1}]
    assert entries["broken (nvrtc)"]["reason"] == "ValueError: that is wrong"
    assert entries["foreign (nvrtc)"]["reason"] == "needs no_such_module"
    assert "broken (nvrtc)" in capsys.readouterr().out


def test_without_time_the_rest_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "CHECKS", [gpu_check.Check("sound", 1)])
    path = tmp_path / "report.json"
    with pytest.raises(SystemExit) as end:
        gpu_check.main(["--device", "cpu", "--seconds", "4", "--json", str(path)])
    assert not end.value.code
    (entry,) = json.loads(path.read_text())["checks"]
    assert entry["reason"] == "no time is left of 4 s"


def test_the_limits_fit_into_ten_minutes_without_detectron2():
    checks = [check for check in gpu_check.CHECKS if "detectron2" not in check.needs]
    assert sum(check.seconds for check in checks) <= 600
    assert {check.name for check in checks if not check.command} <= set(gpu_checks.CHECKS)


@pytest.mark.parametrize("device", gpu_check.SIZES)
@pytest.mark.parametrize("command", [gpu_check.SPEED, gpu_check.FUSED])
def test_benchmarks_of_operators_get_options_that_they_know(command, device, tmp_path):
    check = gpu_check.Check("speed", 1, command=command)
    words = gpu_check.command_of(check, device, tmp_path)
    place = words.index("tools/benchmarks/operators.py")
    args = benchmark.parse_args(words[place + 1 :])
    assert len(args.operators) == 2 and args.device == device
    assert args.batch == ([1, 16] if device == "cuda" else [1])


@pytest.mark.parametrize("name", ["operators", "gradients"])
def test_checks_pass_with_sound_operators_and_fail_with_others(name, monkeypatch, capsys):
    gpu_checks.CHECKS[name]("cpu")
    assert capsys.readouterr().out.startswith("figure: ")
    sound = ops.fused_ms_deform_attn

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(context, output):
            return output.clone()

        @staticmethod
        def backward(context, grad):
            return 1.01 * grad

    monkeypatch.setattr(ops, "fused_ms_deform_attn", lambda *a: WrongGradient.apply(sound(*a)))
    with pytest.raises((AssertionError, RuntimeError), match="fused_ms_deform_attn|Jacobian"):
        gpu_checks.CHECKS[name]("cpu")


def test_the_first_figure_of_an_empty_cache_is_of_every_kernel(monkeypatch, tmp_path, capsys):
    """All of them are given to the compiler, for the GPU at hand."""
    given = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(nvrtc, "target", lambda capability: f"sm_{capability[0]}0")
    monkeypatch.setattr(nvrtc, "cached_binary", lambda *program: given.append(program))
    gpu_checks.compile_all()
    assert {target for _, target in given} == {"sm_90"}
    # As many as nvcc compiles, see tests/tools/kernels/test_report.py.
    assert len({program for program, _ in given}) == 2 * 114
    assert '"kernels": 228' in capsys.readouterr().out


def test_measured_times_stand_beside_the_least_possible(tmp_path, capsys):
    """For the benchmark's own records, whose shape is that of the roofline."""
    assert benchmark.LEVELS == roofline.ENCODER
    report = gpu_check.Report(tmp_path / "report.json", "cuda")
    case = dict(operator="key_aware_ms_deform_attn", shape="encoder", dtype="bfloat16", batch=16)
    records = [
        case | dict(measure=measure, values={"native": 5.0, "pytorch": 9.0})
        for measure in benchmark.TIMES
    ]
    report.add(gpu_check.Check("speed", 1), "passed", records=records)
    gpu_check.print_roofline(report)
    rows = json.loads((tmp_path / "report.json").read_text())["roofline"]
    assert [row[2] for row in rows] == ["forward", "backward"]
    assert all(0 < least < measured == 5000 for *_, measured, least, _ in rows)
    assert capsys.readouterr().out.count("5000, ") == 2
