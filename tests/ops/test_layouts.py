"""Strides and sizes that a kernel might take for granted."""

import pytest
import torch
from sampling_problems import (
    DEVICES,
    SIZES,
    cast,
    make_problem,
    move,
    run,
    run_with_gradients,
    transform,
)


def swap_outer(tensor):
    """Return the same values with strides that allow no flat view and separate the channels."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def heads_first(tensor):
    """Return the same values as [B, M, S, D] in memory, as from a projection for each head."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def slice_of_wider(tensor):
    """Return the same values with dense channels in the middle of a larger tensor."""
    wider = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), torch.nan, dtype=tensor.dtype)
    wider[..., 3:-2] = tensor
    return wider[..., 3:-2]


def every_second(tensor):
    wider = torch.full((*tensor.shape, 2), torch.nan, dtype=tensor.dtype)
    wider[..., 0] = tensor
    return wider[..., 0]


# Whole blocks of 16 channels, or on a GPU heads of 32 and 64, are read in place if strides allow
# it; others are read from a padded copy.
@pytest.mark.parametrize("channels", [5, 16, 32])
@pytest.mark.parametrize("layout", [swap_outer, heads_first, slice_of_wider, every_second])
def test_strided_tensors(attention, form, layout, channels):
    problem = make_problem(SIZES[:3], channels=channels)
    strided = transform(problem, layout)
    assert not any(entry.is_contiguous() for entry in strided.values() if torch.is_tensor(entry))
    expected = run_with_gradients(attention, form, problem)
    for name, result in run_with_gradients(attention, form, strided).items():
        torch.testing.assert_close(result, expected[name], rtol=1e-13, atol=1e-13)


def test_expanded_tensors(attention, form):
    """Stride 0 over the images."""
    problem = transform(make_problem(channels=16), lambda tensor: tensor[:1].expand_as(tensor))
    copied = transform(problem, lambda tensor: tensor.contiguous())
    expected = run_with_gradients(attention, form, copied)
    for name, result in run_with_gradients(attention, form, problem).items():
        torch.testing.assert_close(result, expected[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "layout", [lambda t: t.mT.contiguous().mT, every_second, lambda t: t[:1, :1, :1].expand_as(t)]
)
@pytest.mark.parametrize("channels", [5, 16])
def test_strided_gradient_of_the_output(attention, form, layout, channels):
    """The last one is what ``output.sum().backward()`` passes in."""
    problem = make_problem(channels=channels)
    grad_output = layout(torch.randn(2, 3, 2 * channels, dtype=torch.float64))
    assert not grad_output.is_contiguous()
    expected = run_with_gradients(attention, form, problem, grad_output.contiguous())
    for name, result in run_with_gradients(attention, form, problem, grad_output).items():
        torch.testing.assert_close(result, expected[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("batch, queries, heads", [(2, 0, 2), (0, 3, 2), (0, 0, 2), (2, 3, 0)])
def test_no_queries_images_or_heads(attention, form, batch, queries, heads):
    problem = make_problem(SIZES[:2], 3, batch=batch, queries=queries, heads=heads)
    results = run_with_gradients(attention, form, problem)
    assert results.pop("output").shape == (batch, queries, 4 * heads)
    for name, grad in results.items():
        assert grad.shape == problem[name].shape
        assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_shapes_and_dtypes_of_what_was_given(attention, form, dtype):
    problem = cast(make_problem(channels=5), dtype, locations_dtype=torch.float32)
    results = run_with_gradients(attention, form, problem)
    output = results.pop("output")
    assert (output.shape, output.dtype) == ((2, 3, 10), dtype)
    for name, grad in results.items():
        assert (grad.shape, grad.dtype) == (problem[name].shape, problem[name].dtype)


def test_values_are_left_as_they_are(attention, form):
    problem = transform(make_problem(channels=32), lambda tensor: move(tensor, DEVICES[form]))
    copied = transform(problem, torch.clone)
    run_with_gradients(attention, form, problem)
    run(attention, form, problem)
    for name, entry in copied.items():
        assert not torch.is_tensor(entry) or torch.equal(entry, problem[name])
