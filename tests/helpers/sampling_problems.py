"""Random problems for the sampling operators, and what runs them by either form."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lite_detr import ops

Sizes = tuple[tuple[int, int], ...]
# The tensors of a problem by name, and ``sizes``. The key may be the very tensor ``value``.
Problem = dict[str, Tensor | Sizes]

# The tensors that an operator is differentiated by.
LEAVES = {
    "ms_deform_attn": ("value", "locations", "weights"),
    "key_aware_ms_deform_attn": ("query", "key", "value", "locations"),
}
SIZES = ((4, 5), (3, 2), (2, 2), (1, 3))

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
    """Normal numbers in float64; each location a tenth of a cell or more off the kinks.

    Bilinear sampling has its kinks on the lines through the cells' centres: a gradient there
    depends on which way rounding goes. Locations reach one and a half cells beyond the border.
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


def transform(problem: Problem, function: Callable[[Tensor], Tensor]) -> Problem:
    """Each tensor through the function, one that has two names once."""
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


def level_tensors(sizes: Sizes) -> tuple[Tensor, Tensor]:
    starts = [sum(h * w for h, w in sizes[:level]) for level in range(len(sizes))]
    return torch.tensor(sizes), torch.tensor(starts)


def operator(attention: str, form: str) -> Callable[..., Tensor]:
    """``"native"`` is what `lite_detr.ops` picks where it was built, see `needs_native`."""
    return getattr(ops, attention if form == "native" else f"{attention}_pytorch")


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
    """The output and, by name, the gradients of what the operator takes.

    The gradient of a key that is the value is part of the value's. The output's own gradient is
    made of the problem, so that it is the same for both forms.
    """
    leaves = transform(problem, lambda tensor: tensor.detach().requires_grad_())
    names = [
        name for name in LEAVES[attention] if name != "key" or leaves["key"] is not leaves["value"]
    ]
    output = run(attention, form, leaves)
    if grad_output is None:
        generator = torch.Generator().manual_seed(1)
        grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad(
        output, [leaves[name] for name in names], grad_output.to(output.dtype)
    )
    return {"output": output.detach()} | dict(zip(names, grads))


# Detectron2, which the operators can do without, takes seconds to import.
OPERATORS_ALONE = """
import sys, types
sys.modules["lite_detr"] = types.ModuleType("lite_detr")
sys.modules["lite_detr"].__path__ = [{package!r}]
"""


def run_python(
    code: str, package: Path = Path(ops.__file__).parents[1], **environment: str
) -> subprocess.CompletedProcess:
    """Runs code in a Python of its own, which imports this module and the package's operators."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OPERATORS_ALONE.format(package=str(package)) + code],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
