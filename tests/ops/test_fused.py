"""The fused operators, which take reference points, offsets and logits, compared with the steps."""

import math

import cuda_harness
import pytest
import torch
from sampling_problems import (
    ARGUMENTS,
    DEVICES,
    SIZES,
    make_fused_problem,
    make_problem,
    move,
    needs_native,
    operator,
    relative_error,
    run_kernels,
    transform,
)

from lite_detr import ops
from lite_detr.modeling import MultiScaleDeformableAttention
from lite_detr.ops.sampling import flatten

FUSED = ("fused_ms_deform_attn", "fused_key_aware_ms_deform_attn")
FIVE_LEVELS = ((3, 4), (2, 2), (1, 1), (1, 5), (2, 1))


@pytest.fixture(params=FUSED)
def attention(request):
    return request.param


@pytest.fixture(params=[2, 4], ids=["points", "boxes"])
def coordinates(request):
    return request.param


def call(attention, form, problem):
    return operator(attention, form)(*(problem[name] for name in ARGUMENTS[attention]))


def call_with_gradients(attention, form, problem):
    leaves = transform(problem, lambda tensor: tensor.detach().requires_grad_())
    names = [name for name in ARGUMENTS[attention] if torch.is_tensor(leaves[name])]
    if leaves["key"] is leaves["value"] and "key" in names:
        names.remove("key")
    output = call(attention, form, leaves)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    grads = torch.autograd.grad(output, [leaves[name] for name in names], grad_output)
    return {"output": output.detach()} | dict(zip(names, grads))


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(points=3, channels=32, queries=5, shared_key=True),
        # Two full groups of 16 points, and 13 more.
        dict(sizes=FIVE_LEVELS, points=9, channels=33, heads=1),
        dict(sizes=((4, 4), (2, 3)), points=1, channels=16, queries=40),
    ],
    ids=["usual", "many-points", "one-point"],
)
def test_fused_is_the_steps(attention, form, coordinates, dtype, bound, sizes):
    problem = make_fused_problem(coordinates, dtype, **sizes)
    expected = call_with_gradients(attention, "pytorch", problem)
    for name, result in call_with_gradients(attention, form, problem).items():
        assert result.shape == expected[name].shape and result.dtype == expected[name].dtype
        error = relative_error(result, expected[name])
        assert error <= bound, f"{name} is {error:.1e} off"


def test_steps_are_the_operators_at_locations(form, coordinates):
    """Offsets count cells around points, and half extents over P around boxes."""
    problem = make_fused_problem(coordinates, points=3)
    given = make_problem(points=3)
    weights = given["weights"].flatten(-2).softmax(-1).view_as(given["weights"])
    starts = torch.tensor([0, 20, 26, 30])
    levels = torch.tensor(SIZES), starts
    expected = ops.ms_deform_attn_pytorch(given["value"], *levels, given["locations"], weights)
    output = call("fused_ms_deform_attn", form, problem)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_round_the_results(attention, form, coordinates, dtype):
    problem = make_fused_problem(coordinates, dtype, points=4, channels=32, shared_key=True)
    exact = transform(problem, lambda tensor: tensor.double())
    expected = call_with_gradients(attention, "pytorch", exact)
    for name, result in call_with_gradients(attention, form, problem).items():
        # The softmax's mean gradient comes from the rounded output.
        bound = 2 * torch.finfo(dtype).eps
        if form == "pytorch":
            bound *= 4  # Its weights have 16 bits.
        assert relative_error(result, expected[name]) <= bound, name


@cuda_harness.needs_harness
@pytest.mark.parametrize("channels", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(
    "attention, shared_key",
    [
        ("fused_ms_deform_attn", True),
        ("fused_key_aware_ms_deform_attn", True),
        ("fused_key_aware_ms_deform_attn", False),
    ],
)
@pytest.mark.parametrize(
    "dtype, arch, bound",
    [
        (torch.float32, 80, 1e-5),
        (torch.float32, 90, 1e-5),
        (torch.float64, 90, 1e-12),
        (torch.float16, 80, 2e-3),
        (torch.bfloat16, 90, 2e-2),
    ],
)
def test_every_cuda_kernel(attention, shared_key, dtype, arch, bound, channels):
    """Odd numbers of levels and points, and of queries in the last block; several images."""
    sizes = dict(points=3, channels=channels, queries=5, heads=3, shared_key=shared_key)
    coordinates = 2 if arch == 80 else 4
    problem = make_fused_problem(coordinates, dtype, sizes=((4, 5), (3, 2), (1, 3)), **sizes)
    exact = transform(problem, lambda tensor: tensor.double())
    expected = call_with_gradients(attention, "pytorch", exact)
    results = run_kernels(attention, problem, arch=arch)
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert relative_error(result, expected[name]) <= bound, name


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 3e38, -1e9])
def test_offsets_to_nowhere_sample_zero(attention, form, coordinates, number):
    problem = make_fused_problem(coordinates, torch.float32, points=4, channels=16)
    beside = problem | {"offsets": problem["offsets"].clone()}
    beside["offsets"][..., ::2, :] = -500.0
    problem["offsets"][..., ::2, 0] = number
    expected = call_with_gradients(attention, form, beside)
    results = call_with_gradients(attention, form, problem)
    for name in ("output", "value", "offsets"):
        assert results[name].isfinite().all()
        torch.testing.assert_close(results[name], expected[name], rtol=1e-5, atol=1e-5)
    assert not results["offsets"][..., ::2, :].any()


def registered_arguments(attention, problem):
    arguments = [problem[name] for name in ARGUMENTS[attention]]
    if "key" in ARGUMENTS[attention] and problem["key"] is problem["value"]:
        arguments[1] = None
    return tuple(flatten(entry) if isinstance(entry, tuple) else entry for entry in arguments)


@pytest.mark.parametrize("shared_key", [False, True])
def test_registrations(attention, native_form, coordinates, shared_key):
    problem = make_fused_problem(coordinates, torch.float32, channels=16, shared_key=shared_key)
    problem = transform(problem, lambda t: move(t, DEVICES[native_form]).requires_grad_())
    inputs = registered_arguments(attention, problem)
    forward = getattr(torch.ops.lite_detr, attention)
    torch.library.opcheck(forward, inputs)
    with torch.no_grad():
        results = forward(*inputs)
        inputs = tuple(t.detach() if torch.is_tensor(t) else t for t in inputs)
    saved = results if isinstance(results, tuple) else (results,)
    backward = getattr(torch.ops.lite_detr, f"{attention}_backward")
    for with_references in (False, True):
        arguments = (torch.randn_like(saved[0]), *inputs, *saved, with_references)
        torch.library.opcheck(backward, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(attention, native_form, dynamic):
    torch._dynamo.reset()
    problem = make_fused_problem(4, torch.float32, channels=5)
    problem = transform(problem, lambda t: move(t, DEVICES[native_form]).requires_grad_())

    def function(problem):
        return call(attention, "native", problem).sin()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    names = [name for name in ARGUMENTS[attention] if name != "sizes"]
    results = []
    for run in (function, compiled):
        output = run(problem)
        grads = torch.autograd.grad(output.square().sum(), [problem[name] for name in names])
        results.append((output, *grads))
    for result, expected in zip(*results):
        torch.testing.assert_close(result, expected)


def test_autocast(attention, native_form, coordinates):
    """Reference points stay float32; gradients get the leaves' dtype."""
    problem = make_fused_problem(coordinates, torch.float32, channels=16, points=3)
    leaves = transform(problem, lambda tensor: tensor.requires_grad_())
    with torch.autocast(DEVICES[native_form], torch.bfloat16):
        output = call(attention, native_form, leaves)
    assert output.dtype == torch.bfloat16
    explicit = transform(problem, lambda tensor: tensor.bfloat16())
    exact = explicit | {"references": problem["references"]}
    assert torch.equal(output, call(attention, native_form, exact))
    assert not torch.equal(output, call(attention, native_form, explicit))
    names = [name for name in ARGUMENTS[attention] if name != "sizes"]
    grads = torch.autograd.grad(output.sum(), [leaves[name] for name in names])
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_second_derivative_raises(attention, native_form):
    problem = transform(make_fused_problem(2), lambda tensor: tensor.requires_grad_())
    output = call(attention, native_form, problem)
    (gradient,) = torch.autograd.grad(output.sum(), problem["value"], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative.*_pytorch forms"):
        gradient.sum().backward()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(attention, coordinates, dtype):
    sizes = dict(sizes=((12, 16), (6, 8)), channels=32, queries=240, heads=3, shared_key=True)
    problem = make_fused_problem(coordinates, dtype, **sizes)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(call_with_gradients(attention, "native", problem))
    finally:
        torch.set_num_threads(before)
    for name, result in results[0].items():
        assert torch.equal(result, results[1][name]), name


@needs_native
def test_a_training_step_saves_no_locations_and_no_weights():
    """Of all that a layer passes to the operator, its results of linear layers are kept."""
    attention = MultiScaleDeformableAttention(32, 2, 4, 3)
    problem = make_fused_problem(2, torch.float32, channels=16, points=3)
    inputs = [problem[name].requires_grad_() for name in ("value", "offsets", "logits")]
    value, offsets, logits = inputs
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        output = attention.operator(value, problem["sizes"], problem["references"], offsets, logits)
    known = {t.data_ptr() for t in (*inputs, problem["references"], output)}
    assert saved and {tensor.data_ptr() for tensor in saved} <= known


@pytest.mark.parametrize(
    "name, change, error, message",
    [
        ("sizes", lambda _: ((4, 5), (3, 2), (2, 2), (1, 2)), ValueError, "32 tokens in all"),
        ("references", lambda t: t[..., :1], ValueError, "must be .B, Q, L, 2. points or .B, Q"),
        ("references", lambda t: t[:, :2], ValueError, "reference_points must be"),
        ("references", lambda t: t.half(), TypeError, "reference_points must be"),
        ("offsets", lambda t: t[..., :1], ValueError, "sampling_offsets must be .B, Q, M, L, P, 2"),
        ("offsets", lambda t: t.double(), TypeError, "sampling_offsets must have the value's dtyp"),
        ("offsets", lambda t: t[..., :0, :], ValueError, "at least one point a level"),
    ],
)
@pytest.mark.parametrize("form", [pytest.param("native", marks=needs_native), "pytorch"])
def test_wrong_arguments_are_named(attention, form, name, change, error, message):
    problem = make_fused_problem(2, torch.float32, channels=16)
    problem[name] = change(problem[name])
    with pytest.raises(error, match=message):
        call(attention, form, problem)
