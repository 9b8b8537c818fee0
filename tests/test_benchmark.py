"""The tool that times the parts of a detector, on a model so small that it is done at once."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lite_detr import ops
from lite_detr.modeling import attention

ROOT = Path(__file__).parents[1]
TINY = ["--config-file", str(ROOT / "tests" / "configs" / "tiny.py"), "--size", "64x96"]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "tools" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_a_row_for_each_part(tool, capsys):
    tool.main([*TINY, "--rounds", "2", "--threads", "1"])
    environment, header, _, *rows = capsys.readouterr().out.splitlines()
    assert environment == f"PyTorch {torch.__version__}, 1 threads, 64x96"
    kinds = ["native", "pytorch"] if ops.backend() == "native" else ["pytorch"]
    assert header.split(" | ")[1:-1] == [f"{kind}, ms" for kind in kinds]
    assert [row.split(" | ")[0] for row in rows] == [f"| {part}" for part in (*tool.PARTS, "total")]
    assert rows[-1].endswith("| 100% |")


def test_parts_make_up_the_whole(tool):
    model = tool.instantiate(tool.model_zoo.get_config(TINY[1]).model).eval()
    (times,) = tool.measure(model, (64, 96), ["pytorch"], rounds=2).values()
    assert all(times[part] > 0 for part in tool.PARTS)
    assert max(times[part] for part in tool.PARTS) < times["total"]


def test_operators_are_put_back(tool):
    before = attention.ms_deform_attn
    with tool.operators("pytorch"):
        assert attention.ms_deform_attn is ops.ms_deform_attn_pytorch
    assert attention.ms_deform_attn is before
    with tool.operators("native"):
        assert attention.ms_deform_attn is before
