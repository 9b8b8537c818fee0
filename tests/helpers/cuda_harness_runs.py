"""Runs the problems of `sampling_problems` by the CUDA kernels, in the harness."""

import cuda_harness
import torch
from sampling_problems import LEAVES, Problem, level_tensors, transform
from torch import Tensor


def make_grad_output(problem: Problem, dtype: torch.dtype) -> Tensor:
    """``[B, Q, M * D]``, the same for every form and dtype but for rounding."""
    query = problem["query"]
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(query.flatten(2).shape, generator=generator, dtype=torch.float64)
    return grad_output.to(dtype)


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
            output = cuda_harness.operator(attention, arch)(*arguments)
            saved = ()
        else:
            arguments = (inputs["query"], key, inputs["value"], *levels, inputs["locations"])
            output, logsumexp = cuda_harness.operator(attention, arch)(*arguments)
            saved = (output, logsumexp)
        backward = cuda_harness.operator(f"{attention}_backward", arch)
        grads = backward(to_device(grad_output), *arguments, *saved)
    if attention == "ms_deform_attn":
        names = ("value", "locations", "weights")
    else:
        names = ("query", "key", "value", "locations")
    results = {"output": output} | dict(zip(names, grads))
    if key is None:
        results.pop("key", None)
    assert set(results) - {"output"} <= set(LEAVES[attention])
    return results


def to_device(tensor: Tensor) -> Tensor:
    """A copy in device memory, with the same strides and the same place in its storage."""
    storage = torch.empty(tensor.untyped_storage().nbytes(), dtype=torch.uint8)
    storage.untyped_storage().copy_(tensor.untyped_storage())
    copy = torch.empty(0, dtype=tensor.dtype)
    return copy.set_(
        storage.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )
