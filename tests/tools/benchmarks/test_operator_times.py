"""The program that splits the time of inference by kinds of operators."""

import operator_times
import pytest
import torch
from programs import TINY
from sampling_problems import needs_native
from torch import nn

OperatorClock = operator_times.OperatorClock
CONFIG = str(TINY)
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_kept_memory(monkeypatch):
    """It would last for the rest of the tests' process."""
    monkeypatch.setattr("lite_detr.inference.optimize.keep_freed_memory", lambda: None)


@pytest.mark.parametrize(
    "operator, kind",
    [
        (aten.addmm.default, "products"),
        (aten.convolution.default, "products"),
        (aten._scaled_dot_product_flash_attention_for_cpu.default, "products"),
        (aten.native_layer_norm.default, "norms"),
        (aten.native_group_norm.default, "norms"),
        (aten.relu_.default, "pointwise"),
        (aten.add.Tensor, "pointwise"),
        (aten.cat.default, "copies"),
        (aten._to_copy.default, "copies"),
        (aten.topk.default, "other"),
        (aten.view.default, "other"),
    ],
)
def test_operators_are_told_apart(operator, kind):
    assert operator_times.kind_of(operator) == kind


@needs_native
def test_native_operators_are_sampling():
    for name in ("ms_deform_attn", "key_aware_ms_deform_attn"):
        operator = getattr(torch.ops.lite_detr, name).default
        assert operator_times.kind_of(operator) == "sampling"


def test_a_clock_adds_up_what_ran_under_it(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(operator_times.time, "perf_counter", lambda: float(next(now)))
    x = torch.ones(2, 3)
    with OperatorClock() as clock:
        y = torch.cat([x @ torch.ones(3, 4), x @ torch.ones(3, 4)]).relu()
    assert torch.equal(y, torch.full((4, 4), 3.0))
    # One tick each.
    assert clock.calls["mm 2x3 3x4"] == (2, 2.0)
    assert clock.calls["cat 2x4 2x4"] == (1, 1.0)
    assert clock.seconds["products"] == 2
    assert clock.seconds["copies"] == clock.seconds["pointwise"] == 1
    assert clock.seconds["norms"] == clock.seconds["sampling"] == 0


def test_a_stand_in_computes_products_alone():
    torch.manual_seed(0)
    linear = nn.Linear(64, 32).to(torch.bfloat16)
    x = torch.randn(5, 64).to(torch.bfloat16)
    with torch.no_grad(), OperatorClock(torch.float32):
        product, total = linear(x), x + x
    exact = nn.functional.linear(x.float(), linear.weight.float(), linear.bias.float())
    assert torch.equal(product, exact.to(torch.bfloat16))
    assert torch.equal(total, x + x) and total.dtype == torch.bfloat16


def test_a_table_of_medians(no_kept_memory):
    subject = operator_times.Subject(CONFIG, (), "float32")
    for share in (100, 1, 2, 30):  # The first warms up.
        clock = OperatorClock()
        clock.seconds |= {"products": share * 0.005, "sampling": share * 0.001}
        subject.rounds.append(clock)
    rows = dict(
        line.strip("| ").split(" | ") for line in operator_times.table([subject]).split("\n")[2:]
    )
    assert rows["products"] == "10.0" and rows["sampling"] == "2.0" and rows["norms"] == "0.0"
    assert rows["all but products"] == "2.0" and rows["all"] == "12.0"


def test_the_program_tells_both_dtypes_apart(no_kept_memory, capsys):
    options = ["--size", "64x96", "--dtype", "float32", "bfloat16", "--threads", "1"]
    operator_times.main(["--config-file", CONFIG, *options, "--rounds", "1", "--calls", "3"])
    said = capsys.readouterr().out
    assert "| operators | float32, ms | bfloat16, ms |" in said
    assert said.count(" convolution 1x") >= 2
    stands_in = "bfloat16: products computed in torch.float32" in said
    assert stands_in != operator_times.cpu_computes_in(torch.bfloat16)


def test_errors_are_one_line(capsys):
    with pytest.raises(SystemExit):
        operator_times.main(["--config-file", "nothing.py"])
    assert capsys.readouterr().err.startswith("error: config 'nothing.py' is neither")
    with pytest.raises(SystemExit):
        operator_times.main(["--config-file", CONFIG, "--rounds", "0"])
    assert "given 0, accepted are whole numbers from 1 on" in capsys.readouterr().err
