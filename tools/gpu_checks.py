#!/usr/bin/env python
"""One check of ``gpu_check.py``, or a program of the project, with the chosen form of the kernels.

gpu_checks.py operators --device cuda --form nvrtc
gpu_checks.py --form built --program tools/benchmarks/operators.py --device cuda
"""

import argparse
import itertools
import json
import os
import platform
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from lite_detr import ops
from lite_detr.ops import native, nvrtc, nvrtc_kernels, nvrtc_operators

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of a result's largest number, as tools/benchmarks/operators.py has it.
BOUNDS = {torch.float64: 1e-10, torch.float32: 3e-5}
WIDTHS = (8, 16, 17, 32, 48, 64, 128, 200, 256)
LEVELS = ((7, 9), (4, 5), (1, 3))
Problem = tuple[Callable, Callable, list]


def figure(**figures: object) -> None:
    """Print figures for the report."""
    print(f"figure: {json.dumps(figures)}", flush=True)


def choose_form(form: str) -> None:
    """Let kernels be compiled at run time on GPUs, even if the extension has some.

    Raises:
        SystemExit: built ones are wanted, and do not run.
    """
    if form == "nvrtc" and "cuda" in native.DEVICES:
        native.DEVICES = ("cpu",)
        native.REGISTERED.append(nvrtc_operators.register(define=False))
    if form == "built" and ops.backend("cuda") != "native":
        raise SystemExit(f"the built extension does not run here, but {ops.backend('cuda')}")


def make_problem(
    operator: str,
    width: int,
    dtype: torch.dtype,
    device: str,
    sizes: tuple = LEVELS,
    points: int = 3,
    batch: int = 2,
    queries: int = 37,
    heads: int = 3,
    strided: bool = False,
    seed: int = 0,
) -> Problem:
    """Return an operator, its form in PyTorch, and arguments: leaves, off the sampling's kinks.

    Args:
        operator: the name in `lite_detr.ops`; with ``, shared``, the values are the keys.
        strided: values are part of wider rows.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def leaf(tensor: Tensor, exact: bool = False) -> Tensor:
        kind = torch.promote_types(dtype, torch.float32) if exact else dtype
        return tensor.to(device, kind).requires_grad_()

    name, _, shared = operator.partition(", ")
    tokens = sum(height * width for height, width in sizes)
    sides = torch.tensor([[w, h] for h, w in sizes], dtype=torch.float64)[:, None]
    shape = (batch, queries, heads, len(sizes), points, 2)
    share = torch.rand(shape, generator=generator, dtype=torch.float64)
    part = torch.rand(shape, generator=generator, dtype=torch.float64)
    cells = (share * (sides + 2)).floor() - 2 + 0.1 + 0.8 * part
    rows = random(batch, tokens, heads, width + 8 * strided)[..., :width]
    value = leaf(rows)
    if strided:
        wide = torch.zeros(batch, tokens, heads, width + 8, dtype=dtype, device=device)
        view = wide[..., :width]
        view.copy_(rows)
        value = view.detach().requires_grad_()
    logits = random(*shape[:5])
    arguments: list = [value]
    if name.endswith("key_aware_ms_deform_attn"):
        key = value if shared else leaf(random(batch, tokens, heads, width))
        arguments = [leaf(random(batch, queries, heads, width)), key, value]
    if name.startswith("fused"):
        references = torch.full((batch, queries, len(sizes), 2), 0.5, dtype=torch.float64)
        offsets = cells + 0.5 - 0.5 * sides
        arguments += [sizes, leaf(references, exact=True), leaf(offsets)]
        weights = logits
    else:
        shapes = torch.tensor(sizes)
        starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
        arguments += [shapes, starts, leaf((cells + 0.5) / sides, exact=True)]
        weights = logits.flatten(3).softmax(-1).view_as(logits)
    if not name.endswith("key_aware_ms_deform_attn"):
        arguments.append(leaf(weights))
    return getattr(ops, name), getattr(ops, f"{name}_pytorch"), arguments


def leaves(arguments: list) -> list[Tensor]:
    found = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    return list({id(tensor): tensor for tensor in found}.values())


def solve(function: Callable, arguments: list) -> list[Tensor]:
    """Return the output, and the gradients of all leaves."""
    output = function(*arguments)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves(arguments), grad)]


def in_float64(arguments: list) -> list:
    """Return the same numbers in float64; the key stays the value if it was."""
    copies: dict[int, Tensor] = {}

    def copy(argument):
        if not (isinstance(argument, Tensor) and argument.requires_grad):
            return argument
        exact = argument.detach().double().requires_grad_()
        return copies.setdefault(id(argument), exact)

    return [copy(argument) for argument in arguments]


def check(name: str, problem: Problem) -> float:
    """Return the largest error relative to the largest number; raise if it is too large."""
    function, form, arguments = problem
    results, expected = solve(function, arguments), solve(form, in_float64(arguments))
    dtype = results[0].dtype
    bound = BOUNDS.get(dtype, 4 * torch.finfo(dtype).eps)
    worst = 0.0
    for number, (result, exact) in enumerate(zip(results, expected, strict=True)):
        assert result.shape == exact.shape, f"{name}: result {number} is {tuple(result.shape)}"
        if result.numel():
            scale = exact.abs().max().clamp(min=0.1)
            error = float((result.double() - exact).abs().max() / scale)
            assert error <= bound, (
                f"{name}: result {number} is {error:.1e} off, accepted {bound:.1e}"
            )
            worst = max(worst, error)
    return worst


OPERATORS = (
    "ms_deform_attn",
    "key_aware_ms_deform_attn",
    "key_aware_ms_deform_attn, shared",
    "fused_ms_deform_attn",
    "fused_key_aware_ms_deform_attn",
    "fused_key_aware_ms_deform_attn, shared",
)


def check_device(device: str) -> None:
    """Versions, the speed of the memory, and the time of the first kernel and of a kept one."""
    found = dict(python=platform.python_version(), torch=torch.__version__)
    found |= dict(cuda=torch.version.cuda, operators=ops.backend(device))
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= dict(gpu=properties.name, capability=f"{properties.major}.{properties.minor}")
        found |= dict(
            memory=properties.total_memory, multiprocessors=properties.multi_processor_count
        )
        driver, library = nvrtc.bindings()
        found |= dict(driver=nvrtc.checked(driver.cuDriverGetVersion()))
        found |= dict(nvrtc=library.nvrtcVersion()[1:])
    figure(**found)
    source = torch.empty(2**30 if device == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = min(times(lambda: target.copy_(source), device))
    figure(copy_bytes_per_second=2 * source.numel() / seconds)
    if device != "cuda":
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LITE_DETR_CACHE"] = folder
        for what in ("first call", "call with a kept kernel"):
            function, _, arguments = make_problem("fused_ms_deform_attn", 32, torch.float32, device)
            start = time.perf_counter()
            solve(function, arguments)
            torch.cuda.synchronize()
            figure(what=what, seconds=time.perf_counter() - start)
            for function in (native.compile_kernels, nvrtc_kernels.load):
                function.cache_clear()
        del os.environ["LITE_DETR_CACHE"]


def times(function: Callable[[], object], device: str, number: int = 5) -> list[float]:
    """Return the seconds of calls, after one to warm up."""
    from calls import time_turn

    time_turn(function, device)
    return list(itertools.chain(*(time_turn(function, device) for _ in range(number))))


def check_operators(device: str) -> None:
    """All operators, against their PyTorch forms in float64."""
    if ops.backend(device) == "nvrtc":
        compile_all()
    cases = list(itertools.product(OPERATORS, DTYPES, WIDTHS))
    if device == "cpu":
        cases = [case for case in cases if case[2] in (8, 17)]
    shapes = itertools.cycle([(LEVELS, 3), (LEVELS[:1], 1), (LEVELS + LEVELS[:2], 5)])
    worst: dict[str, float] = {}
    for (operator, dtype, width), (sizes, points) in zip(cases, shapes):
        # The gradient of a single point's logit is zero, and in 16 bits nothing but the output's
        # rounding, from which the backward pass computes it.
        softmax = operator != "ms_deform_attn"
        points = max(points, 2) if softmax and dtype.itemsize == 2 else points
        problem = make_problem(operator, width, dtype, device, sizes=sizes, points=points)
        error = check(f"{operator}, {dtype}, width {width}", problem)
        worst[f"{operator}, {dtype}"] = max(worst.get(f"{operator}, {dtype}", 0.0), error)
    for operator in OPERATORS:
        check(
            f"{operator}, strided", make_problem(operator, 32, torch.float32, device, strided=True)
        )
        for empty in (dict(queries=0), dict(batch=0)):
            check(
                f"{operator}, {empty}", make_problem(operator, 32, torch.float32, device, **empty)
            )
    figure(problems=len(cases) + 3 * len(OPERATORS), worst=worst)


def compile_all() -> None:
    """Compile all kernels on all cores, as one by one they would take most of the time."""
    target = nvrtc.target(torch.cuda.get_device_capability())
    attentions = (("msda", None), ("key_aware", True), ("key_aware", False))
    cases = itertools.product(attentions, DTYPES, nvrtc_kernels.HEAD_WIDTHS, (False, True))
    programs = [
        kernel.program()
        for (attention, shared), dtype, width, fused in cases
        for kernel in nvrtc_kernels.kernels(attention, fused, dtype, width, shared)
    ]
    start = time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as executor:
        list(executor.map(lambda program: nvrtc.cached_binary(program, target), programs))
    figure(kernels=len(set(programs)), seconds=time.perf_counter() - start)


def check_gradients(device: str) -> None:
    """Numerical derivatives in float64."""
    for operator in OPERATORS:
        shape = dict(sizes=LEVELS[1:], points=2, batch=1, queries=2, heads=1)
        function, _, arguments = make_problem(operator, 32, torch.float64, device, **shape)

        def of_leaves(*tensors: Tensor, function=function, arguments=arguments) -> Tensor:
            new = dict(zip(map(id, leaves(arguments)), tensors))
            return function(*(new.get(id(argument), argument) for argument in arguments))

        # Sums of a few terms for each token have any order.
        assert torch.autograd.gradcheck(
            of_leaves, leaves(arguments), nondet_tol=1e-12, fast_mode=True
        ), operator
    figure(operators=len(OPERATORS))


def same(operator: str, results: list[Tensor], expected: list[Tensor]) -> None:
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-4, atol=1e-4, msg=f"{operator} differs")


def check_streams(device: str) -> None:
    """The current stream is the one that kernels run on: inputs get their values late."""
    for operator in OPERATORS:
        function, _, arguments = make_problem(operator, 32, torch.float32, device)
        expected = solve(function, arguments)
        kept = [tensor.detach().clone() for tensor in leaves(arguments)]
        with torch.no_grad():
            for tensor in leaves(arguments):
                tensor.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Private, but the only kernel that keeps a GPU busy for a given time.
            torch.cuda._sleep(50_000_000)
            with torch.no_grad():
                for tensor, value in zip(leaves(arguments), kept):
                    tensor.copy_(value)
            results = solve(function, arguments)
        stream.synchronize()
        same(operator, results, expected)
    figure(operators=len(OPERATORS))


def check_graphs(device: str) -> None:
    """Forward and backward in a CUDA graph, replayed with other inputs.

    The operators that take the levels as tensors have them on the host.
    """
    for operator in OPERATORS:
        function, _, arguments = make_problem(operator, 32, torch.float32, device)
        others = make_problem(operator, 32, torch.float32, device, seed=1)[2]
        grad = torch.ones_like(function(*arguments))

        def step(function=function, arguments=arguments, grad=grad) -> list[Tensor]:
            output = function(*arguments)
            return [output.detach(), *torch.autograd.grad(output, leaves(arguments), grad)]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        with torch.no_grad():
            for tensor, other in zip(leaves(arguments), leaves(others)):
                tensor.copy_(other)
        graph.replay()
        same(operator, results, step())
    figure(operators=len(OPERATORS))


def check_compiled(device: str) -> None:
    """``torch.compile`` with whole graphs, forward and backward."""
    for operator in OPERATORS:
        function, _, arguments = make_problem(operator, 32, torch.float32, device)
        compiled = torch.compile(function, fullgraph=True)
        same(operator, solve(compiled, arguments), solve(function, arguments))
    figure(operators=len(OPERATORS))


def check_memcheck(device: str) -> None:
    """Six problems, whose accesses compute-sanitizer checks."""
    dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float64))
    for operator, dtype, width in zip(OPERATORS, dtypes, (17, 32, 64, 16, 200, 32)):
        check(operator, make_problem(operator, width, dtype, device, queries=65, strided=True))
    figure(problems=len(OPERATORS))


CHECKS = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("check", nargs="?", choices=CHECKS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--form", choices=("nvrtc", "built"), default="nvrtc")
    parser.add_argument("--program", nargs=argparse.REMAINDER, help="runs instead of a check")
    args = parser.parse_args()
    choose_form(args.form)
    if args.program:
        sys.argv = args.program
        sys.path.insert(0, str(Path(args.program[0]).parent))
        runpy.run_path(args.program[0], run_name="__main__")
    else:
        CHECKS[args.check](args.device)


if __name__ == "__main__":
    main()
