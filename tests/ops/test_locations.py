"""Locations outside every map, and numbers that no location samples."""

import math

import pytest
import torch
from sampling_problems import assert_same, cast, make_problem, run, run_with_gradients

NOWHERE = [math.nan, math.inf, -math.inf, 3.4e38, 1e30, -1e30, 1e9, -1e9, 2.0**31, 3.0, -2.0]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])


@pytest.fixture(params=[4, 16], ids=["padded", "unpadded"])
def channels(request):
    return request.param


@DTYPES
@pytest.mark.parametrize("coordinate", [0, 1])
def test_nowhere_samples_zero(attention, form, coordinate, dtype, channels):
    """Every second point is nowhere: the same as a few cells beside the map."""
    problem = make_problem(points=6, channels=channels, queries=len(NOWHERE))
    problem = cast(problem, dtype, torch.float32)
    beside = problem | {"locations": problem["locations"].clone()}
    beside["locations"][..., ::2, :] = -5.0
    nowhere = torch.tensor(NOWHERE)[:, None, None, None]
    problem["locations"][..., ::2, coordinate] = nowhere
    expected = run_with_gradients(attention, form, beside)
    results = run_with_gradients(attention, form, problem)
    for name, result in results.items():
        assert_same(form, name, result, expected[name], problem)
        assert result.isfinite().all()
    assert not results["locations"][..., ::2, :].any()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("samples", ["few", "many"])
def test_invalid_numbers_reach_only_the_queries_that_sample_them(
    attention, form, bad, samples, channels
):
    """Token 0 is invalid; the first query samples it, the others sample other cells or nothing."""
    problem = make_problem(((8, 8),), points=3, channels=channels, batch=1, queries=8)
    problem["locations"] = problem["locations"].clamp(0.3, 0.9)
    problem["locations"][:, 0] = 0.05
    for query, where in enumerate(NOWHERE[:6], start=1):
        problem["locations"][:, query] = where
    if samples == "many":
        for name in ("query", "weights", "locations"):
            problem[name] = torch.cat([problem[name]] * 8, dim=1)
    expected = run_with_gradients(attention, form, problem)
    for name in ("value", "key"):
        problem[name] = problem[name].clone()
        problem[name][:, 0] = bad
    results = run_with_gradients(attention, form, problem)
    others = torch.arange(problem["query"].shape[1]) % 8 != 0
    assert not results["output"][:, ~others].isfinite().all()
    for name in set(results) - {"value", "key"}:
        assert torch.equal(results[name][:, others], expected[name][:, others]), name
    far = slice(16, None)  # the first two rows of cells are the first query's
    for name in {"value", "key"} & set(results):
        assert_same(form, name, results[name][:, far], expected[name][:, far], problem)


def test_an_invalid_token_outside_of_every_sample_does_no_harm(attention, form, channels):
    """On the last cell of the first level, beside cells of the second that are sampled."""
    problem = make_problem(((4, 4), (4, 4)), points=4, channels=channels, queries=20)
    first = problem["locations"][..., 0, :, :]
    problem["locations"][..., 0, :, :] = first.clamp(-0.3, 0.6)
    expected = run_with_gradients(attention, form, problem)
    for name in ("value", "key"):
        problem[name] = problem[name].clone()
        problem[name][:, 15] = math.nan
    for name, result in run_with_gradients(attention, form, problem).items():
        assert_same(form, name, result, expected[name], problem)


def test_logits_that_are_minus_infinite_count_for_nothing(form):
    """Of 17 points all but the last have a logit that overflows; the last is outside: logit 0."""
    problem = cast(make_problem(((2, 2),), points=17, channels=16, batch=1), torch.float32)
    problem["locations"][:] = 0.5
    problem["locations"][..., 16, :] = -3.0
    problem["query"][:], problem["key"][:] = 1e30, -1e30
    assert not run("key_aware_ms_deform_attn", form, problem).any()


def test_smooth_across_the_border(attention, form):
    """A sample leaves the map within one cell of its border, without a jump."""
    steps = torch.linspace(-0.5, 1.5, 400, dtype=torch.float64)
    problem = make_problem(((5, 5),), points=1, batch=1, queries=400, heads=1)
    for name in ("query", "weights"):
        problem[name] = problem[name][:, :1].expand_as(problem[name])
    problem["locations"] = torch.stack([steps, 0.2 + 0.6 * steps], -1).view(1, 400, 1, 1, 1, 2)
    output = run(attention, form, problem)[0]
    largest_step = (output[1:] - output[:-1]).abs().max()
    # A step is 1/40 of a cell, across which a value changes by a few units at most.
    assert 0 < largest_step < 0.3
