"""How far results in 16 bits may be from the exact ones: float32 arithmetic and one rounding."""

import torch
from sampling_problems import Problem, cast, run_with_gradients, transform
from torch import Tensor

from lite_detr.ops.sampling import sample_levels


def assert_rounded_once(
    attention: str, problem: Problem, grad_output: Tensor, results: dict[str, Tensor]
) -> None:
    """Compares results in 16 bits with float64 from the same 16-bit numbers.

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
    """What the gradients lose where the mean in the softmax's Jacobian is off by so much.

    The backward takes the mean from the output, which was rounded. The weights' derivatives times
    it are the logsumexp's. ``mean_changes`` is ``[B, Q, M * D]``, still to be summed by head.
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
