"""The operators around the CUDA kernels, in the harness: limits, sizes, strides and addresses."""

import cuda_harness
import pytest
import torch
from sampling_problems import (
    cast,
    make_problem,
    relative_error,
    run,
    run_kernels,
    run_with_gradients,
)

pytestmark = cuda_harness.needs_harness

ATTENTIONS = pytest.mark.parametrize("attention", ["ms_deform_attn", "key_aware_ms_deform_attn"])


def assert_close(results, expected, bound=1e-5):
    for name, result in results.items():
        assert relative_error(result, expected[name]) <= bound, name


@ATTENTIONS
def test_more_levels_than_a_launch_has_room_for(attention):
    problem = cast(make_problem(((1, 1),) * 32, 1, 16), torch.float32)
    assert_close(run_kernels(attention, problem), run_with_gradients(attention, "pytorch", problem))
    problem = cast(make_problem(((1, 1),) * 33, 1, 16), torch.float32)
    with pytest.raises(ValueError, match=r"up to 32 levels, got 33\. Call the \*_pytorch forms"):
        run_kernels(attention, problem)


@ATTENTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_heads_wider_than_a_warp_has_registers_for(attention, dtype):
    problem = cast(make_problem(channels=257), dtype, torch.promote_types(dtype, torch.float32))
    with pytest.raises(ValueError, match="heads of up to 256 channels, got 257. Use more heads"):
        run_kernels(attention, problem)


@ATTENTIONS
def test_images_and_heads_are_numbered_by_a_grid(attention):
    """As many as a grid has room for; with a stride of 0 they take no memory."""
    inputs = cast(make_problem(((1, 1),), 1, 16, batch=1, queries=1, heads=1), torch.float32)

    def spread(images, heads):
        tensors = {name: t for name, t in inputs.items() if name != "sizes"}
        tensors = {name: t.expand(images, -1, heads, *t.shape[3:]) for name, t in tensors.items()}
        return tensors | {"sizes": inputs["sizes"]}

    output = run_kernels(attention, spread(300, 7))["output"]
    assert torch.equal(output[:1, :, :16].repeat(300, 1, 7), output)
    with pytest.raises(ValueError, match="up to 2147483391 queries, .*, got 65000 x 65000 x 1"):
        run(attention, "harness", spread(65000, 65000))
    for images, heads in ((65536, 1), (1, 65536)):
        message = f"up to 65535 images and heads, got {images} images and {heads} heads"
        with pytest.raises(ValueError, match=message):
            run_kernels(attention, spread(images, heads))


@ATTENTIONS
@pytest.mark.parametrize("sizes", [dict(queries=0), dict(batch=0), dict(batch=0, queries=0)])
def test_nothing_to_do_launches_nothing(attention, sizes):
    problem = cast(make_problem(channels=32, **sizes), torch.float32)
    cuda_harness.counters()
    results = run_kernels(attention, problem)
    assert cuda_harness.counters() == []
    assert results["output"].shape == (problem["value"].shape[0], sizes.get("queries", 3), 64)
    assert not any(result.any() for result in results.values())


@ATTENTIONS
def test_tokens_gigabytes_apart(attention):
    """Offsets beyond 32 bits, in bytes and in numbers: five tokens, 1.5 GiB apart."""
    problem = cast(make_problem(((1, 3), (1, 2)), 3, 32, 1, shared_key=True), torch.float32)
    expected = run_with_gradients(attention, "pytorch", problem)
    stride = 3 * 2**29 // 4
    with cuda_harness.device_memory():
        apart = torch.empty(5 * stride).as_strided((1, 5, 2, 32), (5 * stride, stride, 32, 1))
    apart.copy_(problem["value"])
    results = run_kernels(attention, problem | {"value": apart, "key": apart}, copy=False)
    assert_close(results, expected)


@ATTENTIONS
def test_a_stride_too_wide_for_a_kernel_is_copied(attention):
    problem = cast(make_problem(((1, 2),), 3, 32, 1, shared_key=True), torch.float32)
    expected = run_with_gradients(attention, "pytorch", problem)
    stride = 2**31 // 4
    with cuda_harness.device_memory():
        apart = torch.empty(2 * stride).as_strided((1, 2, 2, 32), (2 * stride, stride, 32, 1))
    apart.copy_(problem["value"])
    results = run_kernels(attention, problem | {"value": apart, "key": apart}, copy=False)
    assert_close(results, expected)


@ATTENTIONS
def test_rows_are_sampled_where_they_lie(attention):
    """Strides between images, tokens and heads need no copy; an odd address does."""
    problem = cast(make_problem(((6, 6),), 4, 32, queries=9, shared_key=True), torch.float32)
    expected = run_with_gradients(attention, "pytorch", problem)
    for offset in (0, 4, 1):
        with cuda_harness.device_memory():
            wider = torch.full((2, 36, 2, 40), torch.nan)
            view = wider[..., offset : offset + 32]
            view.copy_(problem["value"])
        results = run_kernels(attention, problem | {"value": view, "key": view}, copy=False)
        assert_close(results, expected)


@ATTENTIONS
def test_backward_says_that_its_sums_have_no_order(attention):
    problem = cast(make_problem(channels=32), torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match=rf"{attention}_backward .* deterministic"):
            run_kernels(attention, problem)
    finally:
        torch.use_deterministic_algorithms(False)


@ATTENTIONS
def test_bad_sizes_of_levels_reach_no_kernel(attention):
    problem = cast(make_problem(channels=32), torch.float32) | {"sizes": ((100, 100),) * 4}
    cuda_harness.counters()
    with pytest.raises(ValueError, match="reaches past the value's S = 33 tokens"):
        run_kernels(attention, problem)
    assert cuda_harness.counters() == []


def test_logsumexp_of_the_logits():
    """From it the backward pass computes the weights: one number for each query and head."""
    problem = cast(make_problem(((5, 5),), 7, 32, shared_key=True), torch.float32)
    with cuda_harness.device_memory():
        tensors = [problem[name].clone() for name in ("query", "value", "locations")]
    levels = torch.tensor([[5, 5]]), torch.tensor([0])
    operator = cuda_harness.operator("key_aware_ms_deform_attn", arch=90)
    with cuda_harness.device_memory():
        logsumexp = operator(tensors[0], None, tensors[1], *levels, tensors[2])[1]
    expected = torch.ops.lite_detr.key_aware_ms_deform_attn(
        problem["query"], None, problem["value"], *levels, problem["locations"]
    )[1]
    torch.testing.assert_close(logsumexp, expected, rtol=1e-6, atol=1e-6)
