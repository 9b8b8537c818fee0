"""The native operators compared with the PyTorch form, for random shapes and dtypes."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sampling_problems import (
    assert_rounded_once,
    assert_same,
    cast,
    make_problem,
    relative_error,
    run,
    run_with_gradients,
)


@st.composite
def problems(draw):
    """Draw problems with fewer and more samples than tokens, and with partly filled blocks."""
    side = st.integers(1, 9)
    sizes = draw(st.lists(st.tuples(side, side), min_size=1, max_size=5))
    return make_problem(
        sizes=tuple(sizes),
        points=draw(st.integers(1, 9)),
        channels=draw(st.integers(1, 20) | st.sampled_from([31, 32, 33, 48, 64, 96])),
        batch=draw(st.integers(1, 3)),
        queries=draw(st.integers(1, 5) | st.sampled_from([127, 128, 129])),
        heads=draw(st.integers(1, 3)),
        shared_key=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@given(problem=problems())
@settings(max_examples=60, deadline=None, derandomize=True)
# 5 levels of 9 points are 45: two full groups of 16, and 13 more.
@example(make_problem(((3, 4), (2, 2), (1, 1), (1, 5), (2, 1)), 9, 33))
@example(make_problem(((3, 4), (2, 2), (1, 1), (1, 5), (2, 1)), 9, 32, shared_key=True))
@example(make_problem(((9, 9),), 1, 16, queries=1, shared_key=True))
def test_native_equals_pytorch(attention, native_form, dtype, bound, problem):
    problem = cast(problem, dtype)
    expected = run_with_gradients(attention, "pytorch", problem)
    for name, result in run_with_gradients(attention, native_form, problem).items():
        assert result.shape == expected[name].shape
        error = relative_error(result, expected[name])
        assert error <= bound, f"{name} is {error:.1e} off"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(problem=problems())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_16_bit_rounds_once(attention, native_form, dtype, problem):
    problem = cast(problem, dtype, locations_dtype=torch.float32)
    grad_output = problem["query"].flip(1).flatten(2)
    results = run_with_gradients(attention, native_form, problem, grad_output)
    assert results["locations"].dtype == torch.float32
    assert_rounded_once(attention, problem, grad_output, results)


def test_float32_locations_of_16_bit_values_keep_their_precision(attention, native_form):
    """A map of 2000 columns, more than bfloat16 has numbers between 0.5 and 1."""
    width = 2000
    problem = make_problem(((1, width),), points=1, queries=64, channels=16)
    problem["value"] = torch.arange(width).double().view(1, width, 1, 1).expand(2, -1, 2, 16)
    problem["key"] = problem["value"]
    problem["weights"] = torch.ones_like(problem["weights"])
    problem["locations"][..., 1] = 0.5
    problem = cast(problem, torch.bfloat16, locations_dtype=torch.float32)
    columns = (problem["locations"][..., 0].double() * width - 0.5).squeeze().flatten(2)
    inside = ((columns > 0) & (columns < width - 1))[..., None]
    output = run(attention, native_form, problem).double().view(2, 64, 2, 16)
    expected = columns.unflatten(2, (2, 1)).expand_as(output)
    # Values and result are rounded to nearest, each by at most half an eps.
    error = ((output - expected).abs() <= torch.finfo(torch.bfloat16).eps * expected) | ~inside
    assert inside.float().mean() > 0.9
    assert error.all()


def test_locations_of_16_bits_are_taken_as_they_are(attention, native_form):
    problem = cast(make_problem(channels=16), torch.float16)
    wide = problem | {"locations": problem["locations"].float()}
    expected = run_with_gradients(attention, native_form, wide)
    results = run_with_gradients(attention, native_form, problem)
    expected["locations"] = expected["locations"].half()
    for name, result in results.items():
        assert_same(native_form, name, result, expected[name], problem)


@pytest.mark.parametrize("shared_key", [False, True])
@pytest.mark.parametrize("points", [4, 16, 17, 40])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_softmax_of_large_logits(native_form, points, scale, shared_key):
    """Very different logits in one group of points and in several, each with its own maximum."""
    problem = make_problem(((6, 6),), points, 16, queries=20, shared_key=shared_key)
    problem["query"] = problem["query"] * scale
    expected = run("key_aware_ms_deform_attn", "pytorch", problem)
    output = run("key_aware_ms_deform_attn", native_form, cast(problem, torch.float32))
    # The exponential turns a logit's own rounding in float32 into an error of the weight.
    assert relative_error(output, expected) <= 1e-5 * scale


@pytest.mark.parametrize("points", [3, 16, 19])
def test_softmax_of_equal_logits_far_from_zero(native_form, points):
    """Unused lanes of a group of 16 have a logit of 0, whose exponential must not count."""
    for sign in (-1.0, 1.0):
        problem = make_problem(((2, 2),), points, 16, shared_key=True)
        problem["locations"][:] = 0.5
        problem["value"][:] = 1e6
        problem["query"][:] = sign * 1e6
        problem = cast(problem, torch.float32)
        results = run_with_gradients("key_aware_ms_deform_attn", native_form, problem)
        torch.testing.assert_close(results["output"], torch.full((2, 3, 32), 1e6))
        assert all(result.isfinite().all() for result in results.values())


def test_maps_up_to_the_last_number_of_a_token(attention, native_form):
    """2**31 - 1 tokens, with a stride of 0 and without memory; nothing may overflow."""
    tokens = 2**31 - 1
    inputs = make_problem(((1, 1),), points=2, channels=32, batch=1, queries=1, heads=1)
    for dtype in (torch.float32, torch.float64):
        problem = cast(inputs, dtype) | {"sizes": ((1, tokens),)}
        rows = problem["value"].expand(-1, tokens, -1, -1)
        problem |= {"value": rows, "key": rows}
        problem["locations"] = torch.tensor([[0.0, 0.5], [1.0 - 2**-24, 0.5]], dtype=dtype)
        problem["locations"] = problem["locations"].view(1, 1, 1, 1, 2, 2)
        assert run(attention, native_form, problem).isfinite().all()
