"""The CUDA harness's built-ins, compared with CUDA's."""

import pytest
import torch
from cuda_harness import launch_planted, needs_harness, run_planted, to_device

pytestmark = needs_harness

LANES = torch.arange(32)


@pytest.mark.parametrize("kernel", ["shuffle", "shuffle_xor"])
@pytest.mark.parametrize("type", ["float", "double", "int", "unsigned"])
@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
def test_shuffle(kernel, type, width):
    """The warp is divided into segments of a width.

    By number, a source is taken modulo the width, in the lane's own segment. By exclusive or, lanes
    of later segments give nothing, and a lane keeps its own number.
    """
    segment = LANES // width
    for argument in (-1, 0, 1, 2, 5, 16, 31, 33):
        if kernel == "shuffle":
            expected = segment * width + argument % width
        else:
            source = LANES ^ (argument % 32)
            expected = torch.where(source // width > segment, LANES, source)
        output = run_planted(f"{kernel}<{type}>", argument=argument, width=width)
        assert output.equal(expected.float()), argument


def test_vector_additions():
    output = to_device(torch.cat([torch.full((4,), 10.0), torch.zeros(32)]))
    launch_planted("add_vectors", output, output)
    assert output[:4].equal(torch.tensor([42.0, 74.0, 106.0, 138.0]))
    assert output[4:].equal(10.0 + LANES)


def test_double_additions():
    output = to_device(torch.zeros(34))
    launch_planted("add_doubles", output, output)
    total = sum([0.1] * 32)
    assert output[:2].view(torch.float64).item() == total
    assert output[3] == 0.1 and output[33] == pytest.approx(total - 0.1)


@pytest.mark.parametrize("lanes, yes", [(10, 10), (20, 20), (21, 0)])
def test_votes(lanes, yes):
    """Lanes below a number vote apart from the others, of which those from 20 on say no."""
    output = run_planted("vote", argument=lanes)
    assert output.tolist() == [1.0] * yes + [0.0] * (32 - yes)


def test_minima_maxima_and_functions():
    expected = [-3, 2, 2, 3, 1.5, 1.5, 3, -2.5, 8, 10]
    assert run_planted("minima_and_maxima", size=10, block=(1, 1, 1)).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_numbers_to_float(dtype):
    name = "half" if dtype == torch.float16 else "bfloat16"
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    expected = patterns.view(dtype).float()
    for kernel in (f"{name}_to_float", f"{name}_pair_to_floats"):
        output = run_planted(kernel, patterns, 2**16, grid=(64, 1, 1), block=(1024, 1, 1))
        assert_same_bits(output, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float_to_16_bit_numbers(dtype):
    """From all of them, halfway between two neighbours, and from the floats next to these."""
    name = "half" if dtype == torch.float16 else "bfloat16"
    numbers = torch.arange(2**15 - 1, dtype=torch.int16).view(dtype).double()
    # What the next number would be.
    largest = torch.finfo(dtype).max
    numbers[numbers.isinf()] = largest + (largest - numbers[numbers < largest].max())
    halfway = ((numbers[1:] + numbers[:-1]) / 2).float()
    infinity = torch.tensor(torch.inf)
    positive = torch.cat(
        [
            numbers.float(),
            halfway,
            halfway.nextafter(infinity),
            halfway.nextafter(-infinity),
            torch.tensor([torch.inf, torch.nan, 1e-45, 3.4e38]),
        ]
    )
    floats = torch.cat([positive, -positive])
    floats = floats[: len(floats) // 2 * 2]
    expected = floats.to(dtype)
    blocks = len(floats) // 1024 + 1
    for kernel in (f"float_to_{name}", f"floats_to_{name}_pair"):
        output = run_planted(
            kernel, floats, len(floats) // 2, grid=(blocks, 1, 1), block=(1024, 1, 1)
        )
        assert_same_bits(output.view(dtype), expected)


def assert_same_bits(result, expected):
    """Except that any NaN equals any other."""
    assert result.isnan().equal(expected.isnan())
    integers = torch.int32 if result.dtype == torch.float32 else torch.int16
    numbers = ~expected.isnan()
    assert result[numbers].view(integers).equal(expected[numbers].view(integers))
