import itertools
import math

import pytest
import torch
from sampling_problems import (
    LEAVES,
    SIZES,
    cast,
    level_tensors,
    make_problem,
    needs_native,
    operator,
    run,
)

# (levels, points, channels of a head); sizes of the levels are SIZES[:levels].
CASES = [(1, 1, 3), (2, 5, 5), (3, 2, 7), (4, 3, 4)]


def make_inputs(levels, points, channels, seed=0):
    """Make a problem with locations from -0.3 to 1.3: inside, outside and exactly on the border."""
    problem = make_problem(SIZES[:levels], points, channels, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    shape = problem["locations"].shape
    locations = torch.rand(shape, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    on_border = torch.rand(shape, generator=generator) < 0.2
    locations = torch.where(on_border, (locations > 0.5).double(), locations)
    return problem | {"locations": locations}


def bilinear(level_map, x, y):
    """Sum the four cells around (x, y) of a map [H, W, D]; cells that do not exist are zero."""
    height, width, channels = level_map.shape
    column, row = x * width - 0.5, y * height - 0.5
    left, top = math.floor(column), math.floor(row)
    right_share, bottom_share = column - left, row - top
    sample = level_map.new_zeros(channels)
    for cell_row, row_share in ((top, 1 - bottom_share), (top + 1, bottom_share)):
        for cell_column, column_share in ((left, 1 - right_share), (left + 1, right_share)):
            if 0 <= cell_row < height and 0 <= cell_column < width:
                sample += row_share * column_share * level_map[cell_row, cell_column]
    return sample


def sample_point(tokens, sizes, locations, b, q, m, level, p):
    start = sum(h * w for h, w in sizes[:level])
    height, width = sizes[level]
    level_map = tokens[b, start : start + height * width, m].reshape(height, width, -1)
    x, y = locations[b, q, m, level, p].tolist()
    return bilinear(level_map, x, y)


def ms_deform_attn_by_loop(value, sizes, locations, weights):
    batch, queries, heads, levels, points, _ = locations.shape
    output = value.new_zeros(batch, queries, heads, value.shape[-1])
    for b, q, m in itertools.product(range(batch), range(queries), range(heads)):
        for level, p in itertools.product(range(levels), range(points)):
            sample = sample_point(value, sizes, locations, b, q, m, level, p)
            output[b, q, m] += weights[b, q, m, level, p] * sample
    return output.reshape(batch, queries, -1)


def key_aware_by_loop(query, key, value, sizes, locations):
    batch, queries, heads, levels, points, _ = locations.shape
    output = torch.zeros_like(query)
    for b, q, m in itertools.product(range(batch), range(queries), range(heads)):
        exponentials, samples = [], []
        for level, p in itertools.product(range(levels), range(points)):
            sampled_key = sample_point(key, sizes, locations, b, q, m, level, p)
            logit = float(query[b, q, m].dot(sampled_key)) / math.sqrt(query.shape[-1])
            exponentials.append(math.exp(logit))
            samples.append(sample_point(value, sizes, locations, b, q, m, level, p))
        for exponential, sample in zip(exponentials, samples):
            output[b, q, m] += exponential / sum(exponentials) * sample
    return output.reshape(batch, queries, -1)


@pytest.mark.parametrize("case", CASES)
def test_ms_deform_attn_equals_loop(form, case):
    inputs = make_inputs(*case)
    expected = ms_deform_attn_by_loop(
        inputs["value"], inputs["sizes"], inputs["locations"], inputs["weights"]
    )
    output = run("ms_deform_attn", form, inputs)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_key_aware_equals_loop(form, case):
    inputs = make_inputs(*case, seed=1)
    expected = key_aware_by_loop(
        *(inputs[name] for name in ("query", "key", "value", "sizes", "locations"))
    )
    output = run("key_aware_ms_deform_attn", form, inputs)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("point", [(0.0, 0.3), (1.0, 0.7), (0.4, 0.0), (0.6, 1.0), (1.0, 1.0)])
def test_location_on_the_border_takes_half_of_the_outermost_cells(form, point):
    """On an edge the sampling square is half outside, on a corner three quarters of it."""
    value = torch.ones(1, 20, 1, 1, dtype=torch.float64)
    location = torch.tensor(point, dtype=torch.float64).view(1, 1, 1, 1, 1, 2)
    weights = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    attend = operator("ms_deform_attn", form)
    output = attend(value, *level_tensors(((4, 5),)), location, weights)
    edges = sum(coordinate in (0.0, 1.0) for coordinate in point)
    assert output.item() == pytest.approx(0.5**edges, abs=1e-15)


# The gradients of the CUDA kernels in the harness are compared with these in test_cuda_kernels.py.
@pytest.mark.parametrize(
    "form",
    [
        pytest.param("native", marks=needs_native),
        "pytorch",
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("shared_key", [False, True])
def test_gradients(attention, form, shared_key):
    problem = make_problem(SIZES[:2], 2, 3, batch=1, queries=2, shared_key=shared_key)
    locations = problem["locations"]
    assert ((locations < 0) | (locations > 1)).any() and ((locations > 0) & (locations < 1)).any()
    names = [name for name in LEAVES[attention] if not (shared_key and name == "key")]

    def function(*tensors):
        changed = problem | dict(zip(names, tensors))
        return run(attention, form, changed | ({"key": changed["value"]} if shared_key else {}))

    leaves = [problem[name].clone().requires_grad_() for name in names]
    # A GPU adds up the gradients of value and key, of up to eight terms each, in any order.
    assert torch.autograd.gradcheck(function, leaves, nondet_tol=1e-13 if form == "cuda" else 0.0)
    if form == "pytorch":
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_float32_but_for_the_rounding_of_the_result(attention, form, dtype):
    inputs = cast(make_inputs(3, 4, 6), dtype, locations_dtype=torch.float32)
    expected = run(attention, form, cast(inputs, torch.float32))
    output = run(attention, form, inputs)
    assert output.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output.float(), expected, rtol=eps / 2, atol=1e-6)


def test_float32_is_close_to_float64(attention, form):
    inputs = make_inputs(4, 3, 4)
    output = run(attention, form, cast(inputs, torch.float32))
    assert output.dtype == torch.float32
    expected = run(attention, form, inputs)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


def test_key_that_is_value_equals_clone_of_it(form):
    shared = make_problem(SIZES[:3], 2, 5, shared_key=True)
    cloned = shared | {"key": shared["value"].clone()}
    outputs = [run("key_aware_ms_deform_attn", form, inputs) for inputs in (shared, cloned)]
    # The CUDA kernels add up a sample's corners first if it is both key and value.
    bound = 1e-13 if form in ("harness", "cuda") else 0
    torch.testing.assert_close(*outputs, rtol=0, atol=bound)


def test_location_outside_has_logit_zero(form):
    """One point on a cell's centre with logit q.k/sqrt(D), two outside with logit 0."""
    query = torch.tensor([0.3, -0.7, 1.1, 0.5], dtype=torch.float64)
    key = torch.tensor([1.0, 2.0, -0.5, 0.25], dtype=torch.float64)
    value = torch.tensor([4.0, -3.0, 2.0, 1.0], dtype=torch.float64)
    locations = torch.tensor([[0.5, 0.5], [3.0, 0.5], [0.5, -9.0]], dtype=torch.float64)
    output = operator("key_aware_ms_deform_attn", form)(
        query.view(1, 1, 1, 4),
        key.view(1, 1, 1, 4),
        value.view(1, 1, 1, 4),
        *level_tensors(((1, 1),)),
        locations.view(1, 1, 1, 1, 3, 2),
    )
    inside = math.exp((0.3 - 1.4 - 0.55 + 0.125) / 2)
    expected = value * inside / (inside + 2)
    torch.testing.assert_close(output.flatten(), expected, rtol=1e-12, atol=1e-12)


def test_all_locations_outside_give_zero(attention, form):
    inputs = make_inputs(2, 3, 4)
    inputs["locations"] = inputs["locations"] * 0 - 2.0
    assert not run(attention, form, inputs).any()


def test_constant_map_gives_the_constant_inside(attention, form):
    """Half a cell or more from the border, only the weights' sum matters, which is one."""
    inputs = make_inputs(1, 4, 3)
    height, width = inputs["sizes"][0]
    constant = torch.tensor([[1.5, -2.0, 0.25], [3.0, 0.0, -7.0]], dtype=torch.float64)
    inputs["value"] = constant.expand(2, height * width, 2, 3)
    inputs["weights"] = inputs["weights"].flatten(-2).softmax(-1).view_as(inputs["weights"])
    half_cell = torch.tensor([0.5 / width, 0.5 / height], dtype=torch.float64)
    inputs["locations"] = inputs["locations"].clamp(min=half_cell, max=1 - half_cell)
    expected = constant.flatten().expand(2, 3, -1)
    output = run(attention, form, inputs)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
