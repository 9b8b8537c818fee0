"""Runs the problems of `sampling_problems` by the CUDA kernels, in the harness."""

from collections.abc import Sequence

import cuda_harness
import torch
from sampling_problems import Problem, level_tensors, make_grad_output, transform
from torch import Tensor


def run_kernels(
    attention: str,
    problem: Problem,
    grad_output: Tensor | None = None,
    arch: int = 90,
    copy: bool = True,
) -> dict[str, Tensor]:
    """The output and the gradients, as `sampling_problems.run_with_gradients` gives them.

    Tensors keep their strides on the way into device memory. Without ``copy`` the values and keys
    are there already.
    """
    if grad_output is None:
        grad_output = make_grad_output(problem, problem["value"].dtype)

    def move(tensor: Tensor) -> Tensor:
        is_there = not copy and (tensor is problem["value"] or tensor is problem["key"])
        return tensor if is_there else to_device(tensor)

    with cuda_harness.device_memory():
        inputs = transform(problem, move)
        levels = level_tensors(problem["sizes"])
        key = None if inputs["key"] is inputs["value"] else inputs["key"]
        if attention == "ms_deform_attn":
            arguments = (inputs["value"], *levels, inputs["locations"], inputs["weights"])
            names = ("value", "locations", "weights")
        else:
            arguments = (inputs["query"], key, inputs["value"], *levels, inputs["locations"])
            names = ("query", "key", "value", "locations")
        output, saved = forward(attention, arguments, arch)
        grads = backward(attention, to_device(grad_output), arguments, saved, arch)
    results = {"output": output} | dict(zip(names, grads))
    if key is None:
        results.pop("key", None)
    return results


def forward(
    attention: str, arguments: Sequence[Tensor | None], arch: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and what the backward operator takes besides the arguments."""
    result = cuda_harness.operator(attention, arch)(*arguments)
    return (result, ()) if torch.is_tensor(result) else (result[0], result)


def backward(
    attention: str,
    grad_output: Tensor,
    arguments: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    arch: int,
) -> tuple[Tensor, ...]:
    operator = cuda_harness.operator(f"{attention}_backward", arch)
    return operator(grad_output, *arguments, *saved)


class Kernels(torch.autograd.Function):
    """An operator by the CUDA kernels, for tensors of the CPU's and with their derivatives."""

    @staticmethod
    def forward(context, attention: str, *arguments: Tensor | None) -> Tensor:
        with cuda_harness.device_memory():
            moved = [None if t is None else to_device(t.detach()) for t in arguments]
            output, saved = forward(attention, moved, arch=90)
        context.attention, context.moved, context.saved = attention, moved, saved
        return output.clone()

    @staticmethod
    def backward(context, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        with cuda_harness.device_memory():
            moved = to_device(grad_output.detach())
            grads = iter(backward(context.attention, moved, context.moved, context.saved, arch=90))
        # Sizes and starts of levels are integers; the gradient of a key of None is empty.
        results = [
            None if tensor is not None and not tensor.is_floating_point() else next(grads)
            for tensor in context.moved
        ]
        return None, *(
            result if tensor is not None else None for tensor, result in zip(context.moved, results)
        )


def to_device(tensor: Tensor) -> Tensor:
    """A copy in device memory, with the same strides and the same place in its storage."""
    storage = torch.empty(tensor.untyped_storage().nbytes(), dtype=torch.uint8)
    storage.untyped_storage().copy_(tensor.untyped_storage())
    copy = torch.empty(0, dtype=tensor.dtype)
    return copy.set_(
        storage.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )
