"""Random problems for the sampling operators, and functions that run them in each form."""

import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import cuda_harness
import pytest
import torch
from programs import run_program
from torch import Tensor

from lite_detr import ops
from lite_detr.ops.sampling import flatten, sample_levels

Sizes = tuple[tuple[int, int], ...]
# The tensors of a problem by name, and ``sizes``. The key may be the very tensor ``value``.
Problem = dict[str, Tensor | Sizes]

# The tensors that an operator is differentiated by.
LEAVES = {
    "ms_deform_attn": ("value", "locations", "weights"),
    "key_aware_ms_deform_attn": ("query", "key", "value", "locations"),
}
# The arguments of the fused operators, by their names in a problem.
ARGUMENTS = {
    "fused_ms_deform_attn": ("value", "sizes", "references", "offsets", "logits"),
    "fused_key_aware_ms_deform_attn": ("query", "key", "value", "sizes", "references", "offsets"),
}
SIZES = ((4, 5), (3, 2), (2, 2), (1, 3))
# Where the forms of an operator run. Problems and results are on the CPU, whatever the form.
DEVICES = {"native": "cpu", "pytorch": "cpu", "harness": "cpu", "cuda": "cuda"}

needs_native = pytest.mark.skipif(
    ops.backend() != "native", reason="the native operators are not built: see docs/kernels.md"
)


def make_problem(
    sizes: Sizes = SIZES,
    points: int = 2,
    channels: int = 4,
    batch: int = 2,
    queries: int = 3,
    heads: int = 2,
    shared_key: bool = False,
    seed: int = 0,
) -> Problem:
    """Make normal numbers in float64, with locations a tenth of a cell or more off the kinks.

    Bilinear sampling has kinks on the lines through the cells' centres, where rounding decides
    the gradient. Locations reach one and a half cells beyond the border.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = sum(height * width for height, width in sizes)
    cells = torch.tensor([[width, height] for height, width in sizes])[:, None]
    shape = (batch, queries, heads, len(sizes), points, 2)
    part = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    whole = torch.randint(0, 2**31, shape, generator=generator) % (cells + 3) - 2
    value = randn(batch, tokens, heads, channels)
    return {
        "sizes": sizes,
        "value": value,
        "key": value if shared_key else randn(batch, tokens, heads, channels),
        "query": randn(batch, queries, heads, channels),
        "weights": randn(batch, queries, heads, len(sizes), points),
        "locations": (whole + part + 0.5) / cells,
    }


def make_fused_problem(
    coordinates: int, dtype: torch.dtype = torch.float64, **sizes: object
) -> Problem:
    """Make a problem whose points are those of `make_problem`, off the kinks of the sampling."""
    return fuse(make_problem(**sizes), coordinates, dtype)


def fuse(problem: Problem, coordinates: int, dtype: torch.dtype) -> Problem:
    """Give the points of a problem by offsets from random points or boxes, and logits."""
    problem = dict(problem)
    locations = problem.pop("locations")
    batch, queries, _, levels, points, _ = locations.shape
    generator = torch.Generator().manual_seed(3)
    references = torch.rand(
        (batch, queries, levels, coordinates), generator=generator, dtype=torch.float64
    )
    extents = torch.tensor([[width, height] for height, width in problem["sizes"]]).double()
    if coordinates == 4:
        references[..., 2:] += 0.1
        units = references[..., 2:] * (0.5 / points)
    else:
        units = 1 / extents.expand(batch, queries, -1, -1)
    offsets = (locations - references[:, :, None, :, None, :2]) / units[:, :, None, :, None]
    problem |= {"offsets": offsets, "logits": problem.pop("weights"), "references": references}
    exact = torch.promote_types(dtype, torch.float32)
    return transform(problem, lambda tensor: tensor.to(dtype)) | {
        "references": references.to(exact)
    }


def transform(problem: Problem, function: Callable[[Tensor], Tensor]) -> Problem:
    """Apply a function to each tensor, once if it has two names."""
    done: dict[int, Tensor] = {}
    return {
        name: done.setdefault(id(entry), function(entry)) if torch.is_tensor(entry) else entry
        for name, entry in problem.items()
    }


def cast(
    problem: Problem, dtype: torch.dtype, locations_dtype: torch.dtype | None = None
) -> Problem:
    locations = problem["locations"].to(locations_dtype or dtype)
    return transform(problem, lambda tensor: tensor.to(dtype)) | {"locations": locations}


def make_grad_output(problem: Problem, dtype: torch.dtype) -> Tensor:
    """Return ``[B, Q, M * D]``, the same for every form and, except for rounding, every dtype."""
    shape = problem["query"].flatten(2).shape
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def level_tensors(sizes: Sizes) -> tuple[Tensor, Tensor]:
    starts = [sum(h * w for h, w in sizes[:level]) for level in range(len(sizes))]
    return torch.tensor(sizes), torch.tensor(starts)


class _Move(torch.autograd.Function):
    """Keeps any strides; `Tensor.to` another device only keeps those of dense tensors."""

    @staticmethod
    def forward(context, tensor: Tensor, device: str) -> Tensor:
        context.device = tensor.device.type
        storage = tensor.new_empty(0).set_(tensor.untyped_storage())
        layout = tensor.shape, tensor.stride(), tensor.storage_offset()
        return storage.to(device).as_strided(*layout)

    @staticmethod
    def backward(context, grad: Tensor) -> tuple[Tensor, None]:
        return move(grad, context.device), None


def move(tensor: Tensor, device: str) -> Tensor:
    """Move a tensor to a device in the same layout, and its gradient back likewise."""
    return tensor if tensor.device.type in (device, "meta") else _Move.apply(tensor, device)


def operator(attention: str, form: str) -> Callable[..., Tensor]:
    """Return an operator in one of its forms.

    ``"native"`` and ``"cuda"`` are what `lite_detr.ops` chooses if it was built, see `needs_native`
    and the marker ``gpu``. ``"cuda"`` moves CPU tensors to the device, except for the sizes and
    starts of levels, and moves the result back. ``"harness"`` runs the CUDA kernels on the CPU.
    """
    if form == "harness":
        return _in_the_harness(attention)
    function = getattr(ops, f"{attention}_pytorch" if form == "pytorch" else attention)
    if form != "cuda":
        return function
    names = list(inspect.signature(function).parameters)

    def on_device(*tensors: Tensor) -> Tensor:
        arguments = dict(zip(names, tensors))
        levels = {
            name: arguments.pop(name)
            for name in ("spatial_shapes", "level_start_index")
            if name in arguments
        }
        moved = transform(arguments, lambda tensor: move(tensor, "cuda"))
        return move(function(**moved, **levels), "cpu")

    return on_device


def _in_the_harness(attention: str) -> Callable[..., Tensor]:
    def by_kernels(*tensors: Tensor) -> Tensor:
        if attention.endswith("key_aware_ms_deform_attn"):
            query, key, value, *others = tensors
            tensors = (query, None if key is value else key, value, *others)
        # The sizes of levels, which the registered operators take flat.
        return Kernels.apply(
            attention, *(flatten(t) if isinstance(t, tuple) else t for t in tensors)
        )

    return by_kernels


def run(attention: str, form: str, problem: Problem) -> Tensor:
    levels = level_tensors(problem["sizes"])
    if attention == "ms_deform_attn":
        arguments = (problem["value"], *levels, problem["locations"], problem["weights"])
    else:
        inputs = (problem[name] for name in ("query", "key", "value"))
        arguments = (*inputs, *levels, problem["locations"])
    return operator(attention, form)(*arguments)


def run_with_gradients(
    attention: str, form: str, problem: Problem, grad_output: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the output and, by name, the gradients of the operator's inputs.

    The gradient of a key that is the value is part of the value's. The default gradient of the
    output depends on the problem only, so that it is the same for all forms.
    """
    leaves = transform(problem, lambda tensor: tensor.detach().requires_grad_())
    names = [
        name for name in LEAVES[attention] if name != "key" or leaves["key"] is not leaves["value"]
    ]
    output = run(attention, form, leaves)
    if grad_output is None:
        grad_output = make_grad_output(problem, torch.float64)
    grads = torch.autograd.grad(output, [leaves[name] for name in names], grad_output.to(output))
    return {"output": output.detach()} | dict(zip(names, grads))


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Return the error relative to the largest magnitude, or to 0.1 if that is less.

    The problems' numbers are about 1, and a gradient can be exactly zero: that of the softmax of
    one logit, the difference of two equal numbers.
    """
    if not result.numel():
        return 0.0
    difference = (result.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp(min=0.1)).item()


def assert_same(form: str, name: str, result: Tensor, expected: Tensor, problem: Problem) -> None:
    """Assert the same bits, except for what a GPU adds up in any order: gradients of value and key.

    A point reaches a token at most once, so the n terms of a token are all queries' points on its
    level. Two orders of n terms differ by n steps of the sum of their magnitudes, for which the
    largest of all gradients stands. In 16 bits this may change the rounding once.
    """
    if form not in ("cuda", "harness") or name not in ("value", "key"):
        assert torch.equal(result, expected), name
        return
    _, queries, _, _, points, _ = problem["locations"].shape
    sums = torch.promote_types(result.dtype, torch.float32)
    bound = queries * points * torch.finfo(sums).eps
    if sums != result.dtype:
        bound += torch.finfo(result.dtype).eps
    error = relative_error(result, expected)
    assert error <= bound, f"{name} is {error:.1e} off, accepted is {bound:.1e}"


def assert_rounded_once(
    attention: str, problem: Problem, grad_output: Tensor, results: dict[str, Tensor]
) -> None:
    """Compare results in 16 bits with float64 results of the same 16-bit numbers.

    Args:
        problem: in 16 bits, but for locations in float32.
        grad_output: ``[B, Q, M * D]``, in 16 bits.
        results: the output, and gradients by the name of what they are for.
    """
    dtype = problem["value"].dtype
    exact = cast(problem, torch.float64)
    expected = run_with_gradients(attention, "pytorch", exact, grad_output.double())
    if attention == "key_aware_ms_deform_attn":
        rounding = results["output"].double() - expected["output"]
        changes = _through_the_softmax(exact, grad_output.double() * rounding)
        for name, change in changes.items():
            expected[name] = expected[name] - change
    assert results.keys() == expected.keys()
    for name, result in results.items():
        bound = 1e-5 * expected[name].abs().max().clamp(min=0.1)
        if result.dtype == dtype:
            # Half a step of the number; below the smallest normal number, of that one.
            normal = expected[name].abs().clamp(min=torch.finfo(dtype).tiny)
            bound = bound + torch.finfo(dtype).eps / 2 * normal
        assert ((result.double() - expected[name]).abs() <= bound).all(), name


def _through_the_softmax(problem: Problem, mean_changes: Tensor) -> dict[str, Tensor]:
    """Return the change of the gradients if the mean in the softmax's Jacobian changes.

    The backward pass takes the mean from the rounded output. The weights' derivatives times it are
    the logsumexp's. ``mean_changes`` is ``[B, Q, M * D]``, still to be summed by head.
    """
    leaves = transform(problem, lambda tensor: tensor.detach().requires_grad_())
    query, key = leaves["query"], leaves["key"]
    sampled_key = sample_levels(key, problem["sizes"], leaves["locations"])
    query = query.permute(0, 2, 3, 1).unsqueeze(-1) * key.shape[-1] ** -0.5
    logsumexp = (query * sampled_key).sum(2).logsumexp(-1)  # [B, M, Q]
    changes = mean_changes.unflatten(2, key.shape[2:]).sum(-1).transpose(1, 2)
    names = ["query", "value" if leaves["key"] is leaves["value"] else "key", "locations"]
    return dict(
        zip(names, torch.autograd.grad(logsumexp, [leaves[name] for name in names], changes))
    )


def run_kernels(
    attention: str,
    problem: Problem,
    grad_output: Tensor | None = None,
    arch: int = 90,
    copy: bool = True,
) -> dict[str, Tensor]:
    """Return the output and the gradients, as `run_with_gradients` does.

    Tensors keep their strides on the way into device memory. Without ``copy``, values and keys are
    already there.
    """
    if grad_output is None:
        grad_output = make_grad_output(problem, problem["value"].dtype)

    def move(tensor: Tensor) -> Tensor:
        is_there = not copy and (tensor is problem["value"] or tensor is problem["key"])
        return tensor if is_there else cuda_harness.to_device(tensor)

    with cuda_harness.device_memory():
        inputs = transform(problem, move)
        levels = level_tensors(problem["sizes"])
        key = None if inputs["key"] is inputs["value"] else inputs["key"]
        if attention in ARGUMENTS:
            inputs |= {"key": key, "sizes": flatten(problem["sizes"])}
            arguments = tuple(inputs[name] for name in ARGUMENTS[attention])
            names = tuple(name for name in ARGUMENTS[attention] if name != "sizes")
        elif attention == "ms_deform_attn":
            arguments = (inputs["value"], *levels, inputs["locations"], inputs["weights"])
            names = ("value", "locations", "weights")
        else:
            arguments = (inputs["query"], key, inputs["value"], *levels, inputs["locations"])
            names = ("query", "key", "value", "locations")
        output, saved = _forward(attention, arguments, arch)
        grads = _backward(attention, cuda_harness.to_device(grad_output), arguments, saved, arch)
    results = {"output": output} | dict(zip(names, grads))
    if key is None:
        results.pop("key", None)
    return results


def _forward(
    attention: str, arguments: Sequence[Tensor | None], arch: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the output, and what the backward operator takes beside the arguments."""
    result = cuda_harness.operator(attention, arch)(*arguments)
    if attention.startswith("fused"):
        # Also the gradient of the reference points.
        return (result, (result, True)) if torch.is_tensor(result) else (result[0], (*result, True))
    return (result, ()) if torch.is_tensor(result) else (result[0], result)


def _backward(
    attention: str,
    grad_output: Tensor,
    arguments: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    arch: int,
) -> tuple[Tensor, ...]:
    operator = cuda_harness.operator(f"{attention}_backward", arch)
    return operator(grad_output, *arguments, *saved)


class Kernels(torch.autograd.Function):
    """An operator with the CUDA kernels, for ordinary CPU tensors, with derivatives."""

    @staticmethod
    def forward(context, attention: str, *arguments: Tensor | None) -> Tensor:
        with cuda_harness.device_memory():
            moved = [
                cuda_harness.to_device(t.detach()) if torch.is_tensor(t) else t for t in arguments
            ]
            output, saved = _forward(attention, moved, arch=90)
        context.attention, context.moved, context.saved = attention, moved, saved
        return output.clone()

    @staticmethod
    def backward(context, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        with cuda_harness.device_memory():
            moved = cuda_harness.to_device(grad_output.detach())
            grads = iter(_backward(context.attention, moved, context.moved, context.saved, arch=90))
        # Sizes and starts of levels are integers; the gradient of a missing key is empty.
        results = [
            next(grads) if entry is None or is_float(entry) else None for entry in context.moved
        ]
        return None, *(
            result if entry is not None else None for entry, result in zip(context.moved, results)
        )


def is_float(entry: Tensor | list[int]) -> bool:
    return torch.is_tensor(entry) and entry.is_floating_point()


# Without Detectron2, which the operators do not need and which takes seconds to import.
OPERATORS_ALONE = """
import sys, types, warnings
warnings.simplefilter("ignore")
sys.modules["lite_detr"] = types.ModuleType("lite_detr")
sys.modules["lite_detr"].__path__ = [{package!r}]
"""


def run_python(
    code: str,
    package: Path = Path(ops.__file__).parents[1],
    launcher: Sequence[str] = (),
    **environment: str,
) -> subprocess.CompletedProcess:
    """Run code in a new process, which imports this module and the package's operators.

    Args:
        launcher: a program and its options that start a fresh Python; the default is a fork of the
            server that has imported PyTorch.
    """
    environment = {"PYTHONPATH": str(Path(__file__).parent), **environment}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"
        program.write_text(OPERATORS_ALONE.format(package=str(package)) + code)
        if not launcher:
            return run_program(program, **environment)
        return subprocess.run(
            [*launcher, sys.executable, program],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
