"""The operators under PyTorch's tracers, exporters and autocast."""

import pytest
import torch
from sampling_problems import (
    DEVICES,
    LEAVES,
    SIZES,
    assert_same,
    cast,
    level_tensors,
    make_problem,
    move,
    needs_native,
    run,
    run_with_gradients,
    transform,
)

from lite_detr.modeling import KeyAwareDeformableAttention, MultiScaleDeformableAttention, Scales

SHAPES = ((3, 4), (2, 2))
MODULES = pytest.mark.parametrize(
    "make",
    [
        pytest.param(MultiScaleDeformableAttention, id="msda"),
        pytest.param(KeyAwareDeformableAttention, id="kda"),
        pytest.param(
            lambda *sizes: KeyAwareDeformableAttention(*sizes, key_proj=True), id="kda-key_proj"
        ),
    ],
)


@pytest.fixture
def device(native_form):
    return DEVICES[native_form]


def make_leaves(dtype, device, **sizes):
    """Return a problem on the device, so that only the operator is traced."""
    problem = cast(make_problem(**sizes), dtype, torch.float32)
    return transform(problem, lambda tensor: move(tensor, device).requires_grad_())


def arguments(attention, dtype, device, **sizes):
    """Return the arguments of a registered operator, whose key is None if it is the value."""
    leaves = make_leaves(dtype, device, **sizes)
    levels = level_tensors(leaves["sizes"])
    if attention == "ms_deform_attn":
        return (leaves["value"], *levels, leaves["locations"], leaves["weights"])
    key = None if leaves["key"] is leaves["value"] else leaves["key"]
    return (leaves["query"], key, leaves["value"], *levels, leaves["locations"])


@pytest.mark.parametrize("shared_key", [False, True])
@pytest.mark.parametrize(
    "dtype, sizes",
    [
        (torch.float32, dict(channels=5)),
        (torch.float64, dict(channels=16, queries=0)),
        (torch.bfloat16, dict(channels=16, points=5)),
    ],
)
def test_registrations(attention, device, dtype, sizes, shared_key):
    """Schema, autograd, fake kernels and AOT autograd of both passes."""
    forward = getattr(torch.ops.lite_detr, attention)
    backward = getattr(torch.ops.lite_detr, f"{attention}_backward")
    inputs = arguments(attention, dtype, device, shared_key=shared_key, **sizes)
    torch.library.opcheck(forward, inputs)
    with torch.no_grad():
        results = forward(*inputs)
        inputs = tuple(t.detach() if torch.is_tensor(t) else t for t in inputs)
    output, *saved = results if isinstance(results, tuple) else (results,)
    saved = (output, *saved) if saved else ()
    torch.library.opcheck(backward, (torch.randn_like(output), *inputs, *saved))


def compiled_gradients(attention, device, backend, shared_key=False, **options):
    """Return output and gradients, by name, of a function of the operator: eager and compiled."""
    leaves = make_leaves(torch.float32, device, points=3, channels=5, shared_key=shared_key)
    names = ("output", *LEAVES[attention])

    def function(leaves):
        doubled = transform(leaves, lambda tensor: tensor * 2)
        return run(attention, "native", {**doubled, "locations": leaves["locations"]}).sin()

    compiled = torch.compile(function, backend=backend, fullgraph=True, **options)
    results = []
    for call in (function, compiled):
        output = call(leaves)
        tensors = [leaves[name] for name in LEAVES[attention]]
        grads = torch.autograd.grad(output.square().sum(), tensors)
        results.append(dict(zip(names, (output, *grads))))
    return leaves, *results


@pytest.mark.parametrize("shared_key", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(attention, native_form, dynamic, shared_key):
    torch._dynamo.reset()
    problem, eager, compiled = compiled_gradients(
        attention, DEVICES[native_form], "aot_eager", shared_key, dynamic=dynamic
    )
    for name, result in compiled.items():
        assert_same(native_form, name, result, eager[name], problem)


@needs_native
def test_compiled_and_exported_programs_check_the_levels():
    """Sizes that do not fit the values are only known when a program runs."""
    arguments = {
        name: tensor.detach()
        for name, tensor in make_leaves(torch.float32, "cpu").items()
        if name != "sizes"
    }
    shapes, starts = level_tensors(SIZES)
    larger = shapes.clone()
    larger[-1] += 1

    class Attend(torch.nn.Module):
        def forward(self, value, shapes, starts, locations, weights):
            return torch.ops.lite_detr.ms_deform_attn(value, shapes, starts, locations, weights)

    def inputs(shapes):
        return arguments["value"], shapes, starts, arguments["locations"], arguments["weights"]

    torch._dynamo.reset()
    compiled = torch.compile(Attend(), backend="aot_eager", fullgraph=True)
    exported = torch.export.export(Attend(), inputs(shapes)).module()
    for program in (compiled, exported):
        assert torch.equal(program(*inputs(shapes)), Attend()(*inputs(shapes)))
        with pytest.raises(ValueError, match="reaches past the value's S|have .* tokens in all"):
            program(*inputs(larger))


def test_compile_by_inductor(device):
    torch._dynamo.reset()
    _, eager, compiled = compiled_gradients("key_aware_ms_deform_attn", device, "inductor")
    for name, result in compiled.items():
        torch.testing.assert_close(result, eager[name], rtol=1e-5, atol=1e-5)


class Attend(torch.nn.Module):
    """An attention on maps of known sizes that only takes tensors, as exporters require."""

    def __init__(self, make, device="cpu"):
        super().__init__()
        torch.manual_seed(0)
        self.device = device
        self.attention = make(32, 2, 2, 3).to(device)
        torch.nn.init.normal_(self.attention.sampling_offsets.weight)
        masks = [torch.zeros(2, *shape, dtype=torch.bool, device=device) for shape in SHAPES]
        self.scales = Scales.from_masks(masks, False, torch.float32)

    def forward(self, query, reference_points, memory):
        return self.attention(query, reference_points, memory, self.scales)

    def inputs(self):
        """Return a query, reference points and memory."""
        tensors = (
            torch.randn(2, 5, 32),
            torch.rand(2, 5, 2, 2),
            torch.randn(2, self.scales.num_tokens, 32),
        )
        return tuple(tensor.to(self.device) for tensor in tensors)


def parameter_gradients(module, call, inputs):
    output = call(*inputs)
    return output, *torch.autograd.grad(output.square().sum(), list(module.parameters()))


@MODULES
def test_compile_modules(make, device):
    torch._dynamo.reset()
    module = Attend(make, device)
    inputs = module.inputs()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    expected = parameter_gradients(module, module, inputs)
    for result, eager in zip(parameter_gradients(module, compiled, inputs), expected):
        torch.testing.assert_close(result, eager)


@needs_native
@MODULES
def test_export_modules(make):
    """The program has the operator as one node, and takes any number of queries."""
    module = Attend(make)
    inputs = module.inputs()
    dynamic = ({1: torch.export.Dim("queries", min=2)}, {1: torch.export.Dim("queries", min=2)})
    program = torch.export.export(module, inputs, dynamic_shapes=(*dynamic, None))
    targets = {str(node.target) for node in program.graph.nodes}
    assert len([target for target in targets if target.startswith("lite_detr.")]) == 1
    more = [torch.cat([tensor, tensor], dim=1) for tensor in inputs[:2]]
    for arguments in (inputs, (*more, inputs[2])):
        torch.testing.assert_close(program.module()(*arguments), module(*arguments))


def test_autocast(attention, native_form):
    """Tensors with channels become bfloat16, locations do not; gradients get the leaves' dtype."""
    leaves = transform(
        cast(make_problem(channels=16), torch.float32), lambda tensor: tensor.requires_grad_()
    )
    with torch.autocast(DEVICES[native_form], torch.bfloat16):
        output = run(attention, native_form, leaves)
    assert output.dtype == torch.bfloat16
    grads = torch.autograd.grad(output.sum(), [leaves[name] for name in LEAVES[attention]])
    assert {grad.dtype for grad in grads} == {torch.float32}
    explicit = cast(leaves, torch.bfloat16, locations_dtype=torch.float32)
    assert torch.equal(output, run(attention, native_form, explicit))
    # bfloat16 locations would give another result.
    assert not torch.equal(output, run(attention, native_form, cast(leaves, torch.bfloat16)))


def test_autocast_of_a_key_that_is_the_value(native_form):
    """The two stay one tensor, whose gradient is complete."""
    attention = "key_aware_ms_deform_attn"
    problem = cast(make_problem(channels=16, shared_key=True), torch.float32)
    explicit = cast(problem, torch.bfloat16, locations_dtype=torch.float32)
    expected = run_with_gradients(attention, native_form, explicit)
    with torch.autocast(DEVICES[native_form], torch.bfloat16):
        results = run_with_gradients(attention, native_form, problem)
    assert results["value"].dtype == torch.float32
    for name, result in results.items():
        same_dtype = result.to(expected[name].dtype)
        assert_same(native_form, name, same_dtype, expected[name], problem)


@MODULES
def test_modules_under_autocast(make, device):
    module = Attend(make, device)
    inputs = module.inputs()
    expected = parameter_gradients(module, module, inputs)
    with torch.autocast(device, torch.bfloat16):
        results = parameter_gradients(module, module, inputs)
    assert results[0].dtype == torch.bfloat16
    torch.testing.assert_close(results[0].float(), expected[0], rtol=0.1, atol=0.1)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in results[1:])


def test_second_derivative_raises(attention, native_form):
    """The PyTorch form has one: see the tests of gradients."""
    problem = transform(make_problem(), lambda tensor: tensor.requires_grad_())
    output = run(attention, native_form, problem)
    (gradient,) = torch.autograd.grad(output.sum(), problem["value"], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative.*_pytorch forms"):
        gradient.sum().backward()
