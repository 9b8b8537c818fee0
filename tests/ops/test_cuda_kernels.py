"""The CUDA kernels, with every thread on the CPU, compared with the PyTorch form."""

import cuda_harness
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sampling_problems import (
    assert_rounded_once,
    cast,
    make_grad_output,
    make_problem,
    relative_error,
    run_kernels,
    run_with_gradients,
)

pytestmark = cuda_harness.needs_harness

# Some fill one vector of a lane and some several; some are padded.
WIDTHS = (8, 16, 24, 32, 48, 64, 96, 128, 200, 256)
LEVELS = ((4, 5), (3, 2), (1, 3))
CASES = pytest.mark.parametrize(
    "attention, shared_key",
    [
        pytest.param("ms_deform_attn", True, id="msda"),
        pytest.param("key_aware_ms_deform_attn", True, id="shared-key"),
        pytest.param("key_aware_ms_deform_attn", False, id="own-key"),
    ],
)
# What differs between architectures are the atomic additions.
ARCHITECTURES = pytest.mark.parametrize("arch", cuda_harness.ARCHITECTURES)
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}


def assert_close(results, expected, bound):
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert result.shape == expected[name].shape, name
        assert result.dtype == expected[name].dtype, name
        error = relative_error(result, expected[name])
        assert error <= bound, f"{name} is {error:.1e} off"


def assert_agrees(attention, problem, arch=90):
    dtype = problem["value"].dtype
    grad_output = make_grad_output(problem, dtype)
    results = run_kernels(attention, problem, grad_output, arch)
    if dtype in BOUNDS:
        expected = run_with_gradients(attention, "pytorch", problem, grad_output)
        assert_close(results, expected, BOUNDS[dtype])
    else:
        assert_rounded_once(attention, problem, grad_output, results)


@CASES
@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize(
    "dtype, arch",
    [
        (dtype, arch)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        for arch in cuda_harness.ARCHITECTURES
        # float64 has one version for all architectures.
        if dtype != torch.float64 or arch == max(cuda_harness.ARCHITECTURES)
    ],
)
def test_every_width_and_dtype(attention, shared_key, dtype, channels, arch):
    """Odd numbers of levels and points, and of queries in the last block; several images."""
    problem = make_problem(LEVELS, 3, channels, 2, 5, 3, shared_key=shared_key, seed=channels)
    locations_dtype = torch.promote_types(dtype, torch.float32)
    assert_agrees(attention, cast(problem, dtype, locations_dtype), arch)


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes, first", [(((9, 20), (5, 7), (1, 3)), 0), (((12, 9), (7, 17)), 1)])
def test_queries_that_are_tokens(attention, shared_key, dtype, sizes, first):
    """They are taken by tiles, of which some cross a map's border."""
    queries = sum(height * width for height, width in sizes[first:])
    problem = make_problem(sizes, 3, 16, 2, queries, 2, shared_key=shared_key)
    cuda_harness.counters()
    assert_agrees(attention, cast(problem, dtype, torch.float32))
    # Small blocks of 64 threads, four for each query.
    tiles = sum(-(-height // 4) * -(-width // 4) for height, width in sizes[first:])
    assert cuda_harness.counters()[0]["blocks"] == tiles * 2 * 2


@st.composite
def problems(draw):
    side = st.integers(1, 7)
    return make_problem(
        sizes=tuple(draw(st.lists(st.tuples(side, side), min_size=1, max_size=6))),
        points=draw(st.integers(1, 9)),
        channels=draw(st.sampled_from([5, 16, 32, 64])),
        batch=draw(st.integers(1, 3)),
        queries=draw(st.integers(1, 5) | st.sampled_from([15, 16, 17, 31, 32, 33, 65])),
        heads=draw(st.integers(1, 3)),
        shared_key=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


@pytest.mark.parametrize("attention", ["ms_deform_attn", "key_aware_ms_deform_attn"])
@given(
    problem=problems(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    arch=st.sampled_from(cuda_harness.ARCHITECTURES),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None, derandomize=True)
# 6 levels of 9 points are 54: more than a warp's lanes, and not a multiple of any group.
@example(make_problem(((3, 3),) * 6, 9, 32, 1, 33, 2), torch.float32, 80, 0)
@example(make_problem(((3, 3),) * 6, 9, 128, 1, 5, 1, shared_key=True), torch.float32, 90, 0)
@example(make_problem(((1, 1),), 1, 16, 1, 1, 1), torch.float64, 90, 0)
# Points go in pairs, and the last one has none.
@example(make_problem(((3, 3),), 7, 32, 1, 3, 1, shared_key=True), torch.float32, 90, 0)
def test_random_shapes_in_random_order(attention, problem, dtype, arch, seed):
    locations_dtype = torch.promote_types(dtype, torch.float32)
    with cuda_harness.schedule("random", seed):
        assert_agrees(attention, cast(problem, dtype, locations_dtype), arch)


@CASES
@ARCHITECTURES
def test_order_of_threads(attention, shared_key, arch):
    """Lanes, warps and blocks may run in any order, which only affects the rounding of sums."""
    problem = make_problem(LEVELS, 4, 32, 2, 40, 2, shared_key=shared_key)
    problem = cast(problem, torch.float32)
    with cuda_harness.schedule("ascending"):
        expected = run_kernels(attention, problem, arch=arch)
    for order, seed in (("descending", 0), ("random", 1), ("random", 2)):
        with cuda_harness.schedule(order, seed):
            results = run_kernels(attention, problem, arch=arch)
        for name in results:
            if name not in ("value", "key"):
                assert torch.equal(results[name], expected[name]), name
        assert_close(results, expected, 2e-6)


@pytest.mark.parametrize("shared_key", [False, True])
@pytest.mark.parametrize("points", [4, 16, 40])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_softmax_of_large_logits(points, scale, shared_key):
    problem = make_problem(((6, 6),), points, 32, queries=20, shared_key=shared_key)
    problem["query"] = problem["query"] * scale
    expected = run_with_gradients("key_aware_ms_deform_attn", "pytorch", problem)["output"]
    output = run_kernels("key_aware_ms_deform_attn", cast(problem, torch.float32))["output"]
    # The exponential turns a logit's own rounding in float32 into an error of the weight.
    assert (output - expected).abs().max() <= 1e-5 * scale * expected.abs().max()


@pytest.mark.parametrize("points", [3, 16, 19])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_softmax_of_equal_logits_far_from_zero(points, sign):
    """Lanes without a point must not take part, whatever their logit."""
    problem = make_problem(((2, 2),), points, 32, shared_key=True)
    problem["locations"][:] = 0.5
    problem["value"][:] = 1e6
    problem["query"][:] = sign * 1e6
    results = run_kernels("key_aware_ms_deform_attn", cast(problem, torch.float32))
    torch.testing.assert_close(results["output"], torch.full((2, 3, 64), 1e6))
    assert all(result.isfinite().all() for result in results.values())


@CASES
@ARCHITECTURES
def test_each_number_is_read_once(attention, shared_key, arch):
    """Locations, weights and rows, 16 bytes a load; key and value once if they are one tensor."""
    points, lanes, queries = 12, 8, 32
    problem = make_problem(((9, 9),), points, 32, 1, queries, 1, shared_key=shared_key)
    problem["locations"] = problem["locations"].clamp(0.2, 0.8)
    problem = cast(problem, torch.float32)
    cuda_harness.counters()
    run_kernels(attention, problem, arch=arch)
    forward, backward = cuda_harness.counters()
    rows = 4 * points * queries * (1 if shared_key else 2)
    numbers = points * queries
    queries_read = {"ms_deform_attn": 0, "key_aware_ms_deform_attn": queries * lanes}[attention]
    weights_read = {"ms_deform_attn": numbers, "key_aware_ms_deform_attn": 0}[attention]
    assert forward["loads"] == rows * lanes + numbers + weights_read + queries_read
    row_bytes = rows * 128
    assert forward["loaded_bytes"] == row_bytes + 8 * numbers + 4 * weights_read + 16 * queries_read
    assert forward["atomics"] == 0
    assert backward["atomic_bytes"] == row_bytes
    assert backward["atomics"] == row_bytes // (16 if arch >= 90 else 4)
