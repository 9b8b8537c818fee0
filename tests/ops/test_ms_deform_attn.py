import itertools
import math

import pytest
import torch

from lite_detr.ops import key_aware_ms_deform_attn, ms_deform_attn

# (levels, points, channels of a head), with 2 heads; sizes of the levels are SIZES[:levels].
SIZES = ((4, 5), (3, 2), (2, 2), (1, 3))
CASES = [(1, 1, 3), (2, 5, 5), (3, 2, 7), (4, 3, 4)]
BATCH, QUERIES, HEADS = 2, 3, 2


def level_tensors(sizes):
    starts = [sum(h * w for h, w in sizes[:level]) for level in range(len(sizes))]
    return torch.tensor(sizes), torch.tensor(starts)


def random_locations(levels, points, generator):
    """From -0.3 to 1.3, so within, across and beyond the border, and some exactly on it."""
    shape = (BATCH, QUERIES, HEADS, levels, points, 2)
    locations = torch.rand(shape, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    on_border = torch.rand(shape, generator=generator) < 0.2
    return torch.where(on_border, (locations > 0.5).double(), locations)


def make_inputs(levels, points, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = SIZES[:levels]
    tokens = sum(h * w for h, w in sizes)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "sizes": sizes,
        "value": randn(BATCH, tokens, HEADS, channels),
        "key": randn(BATCH, tokens, HEADS, channels),
        "query": randn(BATCH, QUERIES, HEADS, channels),
        "weights": randn(BATCH, QUERIES, HEADS, levels, points),
        "locations": random_locations(levels, points, generator),
    }


def bilinear(level_map, x, y):
    """Sums the four cells around (x, y) of a map [H, W, D]; cells that do not exist are zero."""
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


def run_ms_deform_attn(inputs, dtype=torch.float64, locations_dtype=None):
    return ms_deform_attn(
        inputs["value"].to(dtype),
        *level_tensors(inputs["sizes"]),
        inputs["locations"].to(locations_dtype or dtype),
        inputs["weights"].to(dtype),
    )


def run_key_aware(inputs, dtype=torch.float64, locations_dtype=None):
    return key_aware_ms_deform_attn(
        *(inputs[name].to(dtype) for name in ("query", "key", "value")),
        *level_tensors(inputs["sizes"]),
        inputs["locations"].to(locations_dtype or dtype),
    )


OPERATORS = pytest.mark.parametrize("run", [run_ms_deform_attn, run_key_aware])


@pytest.mark.parametrize("case", CASES)
def test_ms_deform_attn_equals_loop(case):
    inputs = make_inputs(*case)
    expected = ms_deform_attn_by_loop(
        inputs["value"], inputs["sizes"], inputs["locations"], inputs["weights"]
    )
    torch.testing.assert_close(run_ms_deform_attn(inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_key_aware_equals_loop(case):
    inputs = make_inputs(*case, seed=1)
    expected = key_aware_by_loop(
        *(inputs[name] for name in ("query", "key", "value", "sizes", "locations"))
    )
    torch.testing.assert_close(run_key_aware(inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("point", [(0.0, 0.3), (1.0, 0.7), (0.4, 0.0), (0.6, 1.0), (1.0, 1.0)])
def test_location_on_the_border_takes_half_of_the_outermost_cells(point):
    """On an edge the sampling square is half outside, on a corner three quarters of it."""
    value = torch.ones(1, 20, 1, 1, dtype=torch.float64)
    location = torch.tensor(point, dtype=torch.float64).view(1, 1, 1, 1, 1, 2)
    weights = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    output = ms_deform_attn(value, *level_tensors(((4, 5),)), location, weights)
    edges = sum(coordinate in (0.0, 1.0) for coordinate in point)
    assert output.item() == pytest.approx(0.5**edges, abs=1e-15)


def smooth_locations(levels, points):
    """Off the lines through cell centres, where bilinear sampling has kinks."""
    generator = torch.Generator().manual_seed(5)
    cells = torch.tensor([[w, h] for h, w in SIZES[:levels]], dtype=torch.float64)[:, None]
    shape = (1, 2, HEADS, levels, points, 2)
    whole = torch.randint(-2, 6, shape, generator=generator) % (cells + 2) - 1
    part = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    return (whole + part + 0.5) / cells


def gradcheck_inputs():
    locations = smooth_locations(2, 2)
    assert ((locations < 0) | (locations > 1)).any() and ((locations > 0) & (locations < 1)).any()
    inputs = make_inputs(2, 2, 3)
    tensors = {name: inputs[name][:1] for name in ("value", "key")}
    tensors |= {name: inputs[name][:1, :2] for name in ("query", "weights")}
    tensors["locations"] = locations
    return {name: t.clone().requires_grad_() for name, t in tensors.items()}


def test_ms_deform_attn_gradients():
    levels = level_tensors(SIZES[:2])
    inputs = gradcheck_inputs()
    assert torch.autograd.gradcheck(
        lambda value, locations, weights: ms_deform_attn(value, *levels, locations, weights),
        (inputs["value"], inputs["locations"], inputs["weights"]),
    )


@pytest.mark.parametrize("shared_key", [False, True])
def test_key_aware_gradients(shared_key):
    levels = level_tensors(SIZES[:2])
    inputs = gradcheck_inputs()

    def run(query, value, locations, key=None):
        key = value if key is None else key
        return key_aware_ms_deform_attn(query, key, value, *levels, locations)

    names = ["query", "value", "locations"] + ([] if shared_key else ["key"])
    assert torch.autograd.gradcheck(run, tuple(inputs[name] for name in names))


@OPERATORS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_float32_but_for_the_rounding_of_the_result(run, dtype):
    inputs = make_inputs(3, 4, 6)
    rounded = {
        name: tensor.to(dtype).double() if torch.is_tensor(tensor) else tensor
        for name, tensor in inputs.items()
    }
    rounded["locations"] = inputs["locations"]
    expected = run(rounded, torch.float32)
    output = run(inputs, dtype, locations_dtype=torch.float32)
    assert output.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output.float(), expected, rtol=eps / 2, atol=1e-6)


@OPERATORS
def test_float32_is_close_to_float64(run):
    inputs = make_inputs(4, 3, 4)
    output = run(inputs, torch.float32)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), run(inputs), rtol=1e-5, atol=1e-5)


def test_key_that_is_value_equals_clone_of_it():
    inputs = make_inputs(3, 2, 5)
    query, value = inputs["query"], inputs["value"]
    levels = level_tensors(inputs["sizes"])
    shared = key_aware_ms_deform_attn(query, value, value, *levels, inputs["locations"])
    cloned = key_aware_ms_deform_attn(query, value.clone(), value, *levels, inputs["locations"])
    torch.testing.assert_close(shared, cloned, rtol=0, atol=0)


def test_location_outside_has_logit_zero():
    """One point on a cell's centre with logit q.k/sqrt(D), two outside with logit 0."""
    query = torch.tensor([0.3, -0.7, 1.1, 0.5], dtype=torch.float64)
    key = torch.tensor([1.0, 2.0, -0.5, 0.25], dtype=torch.float64)
    value = torch.tensor([4.0, -3.0, 2.0, 1.0], dtype=torch.float64)
    locations = torch.tensor([[0.5, 0.5], [3.0, 0.5], [0.5, -9.0]], dtype=torch.float64)
    output = key_aware_ms_deform_attn(
        query.view(1, 1, 1, 4),
        key.view(1, 1, 1, 4),
        value.view(1, 1, 1, 4),
        *level_tensors(((1, 1),)),
        locations.view(1, 1, 1, 1, 3, 2),
    )
    inside = math.exp((0.3 - 1.4 - 0.55 + 0.125) / 2)
    expected = value * inside / (inside + 2)
    torch.testing.assert_close(output.flatten(), expected, rtol=1e-12, atol=1e-12)


@OPERATORS
def test_all_locations_outside_give_zero(run):
    inputs = make_inputs(2, 3, 4)
    inputs["locations"] = inputs["locations"] * 0 - 2.0
    assert torch.equal(run(inputs), torch.zeros(BATCH, QUERIES, HEADS * 4, dtype=torch.float64))


@OPERATORS
def test_constant_map_gives_the_constant_inside(run):
    """At least half a cell from the border nothing but the weights' sum, one, counts."""
    inputs = make_inputs(1, 4, 3)
    height, width = inputs["sizes"][0]
    constant = torch.tensor([[1.5, -2.0, 0.25], [3.0, 0.0, -7.0]], dtype=torch.float64)
    inputs["value"] = constant.expand(BATCH, height * width, HEADS, 3)
    inputs["weights"] = inputs["weights"].flatten(-2).softmax(-1).view_as(inputs["weights"])
    half_cell = torch.tensor([0.5 / width, 0.5 / height], dtype=torch.float64)
    inputs["locations"] = inputs["locations"].clamp(min=half_cell, max=1 - half_cell)
    expected = constant.flatten().expand(BATCH, QUERIES, -1)
    torch.testing.assert_close(run(inputs), expected, rtol=1e-12, atol=1e-12)


def swap_layout(tensor):
    """The same values behind strides that no view as a flat tensor fits."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


@OPERATORS
def test_non_contiguous_inputs(run):
    inputs = make_inputs(3, 2, 5)
    swapped = {
        name: swap_layout(tensor) if torch.is_tensor(tensor) else tensor
        for name, tensor in inputs.items()
    }
    assert not any(t.is_contiguous() for t in swapped.values() if torch.is_tensor(t))
    torch.testing.assert_close(run(swapped), run(inputs), rtol=1e-14, atol=1e-14)


@OPERATORS
@pytest.mark.parametrize("batch, queries", [(BATCH, 0), (0, QUERIES)])
def test_empty_queries_or_batch(run, batch, queries):
    inputs = make_inputs(2, 3, 4)
    for name in ("query", "weights", "locations"):
        inputs[name] = inputs[name][:batch, :queries]
    for name in ("key", "value"):
        inputs[name] = inputs[name][:batch]
    assert run(inputs).shape == (batch, queries, HEADS * 4)
