#!/usr/bin/env python
"""Time the sampling operators: native, in PyTorch and, where installed, torch-ms-deform-attn's.

benchmark_ops.py --batch 1 4 --threads 1 2 --json kernels.json   # the whole of it
benchmark_ops.py --shapes decoder --dtype float32 bfloat16       # a part
benchmark_ops.py --device cuda

The encoder's shape has a query for each token, the decoder's as many as --queries says; queries
look a few cells around their references, in 8 heads of 32 channels, at 4 points on each level. The
key of key-aware attention is the value, as in the released models. Their code samples it twice,
once as the key and once as the value: "pytorch, keys apart" does the same.

Contestants are checked against the PyTorch form before they are timed. They take turns, so that
whatever else the machine does hits all of them alike; figures are medians over the rounds, in
milliseconds, and in brackets how many times the native operator's. Backward is timed on a graph
made beforehand.

Memory is the peak while one call runs above what was in use before it, with the results and
gradients; in MiB. On CUDA it is the allocator's count. On the CPU it is Linux's count of the
process's resident pages (VmHWM), set back before each call, after malloc has handed back what it
keeps of freed blocks: so memory that a kernel takes behind PyTorch's allocator counts as well.
"""

import argparse
import ctypes
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lite_detr import ops

HEADS, CHANNELS, POINTS = 8, 32, 4
# The maps of an 800x1066 image at strides 8 to 64.
LEVELS = ((100, 134), (50, 67), (25, 34), (13, 17))
LEAVES = {
    "ms_deform_attn": ("value", "locations", "weights"),
    "key_aware_ms_deform_attn": ("query", "value", "locations"),
}
OTHER = "torch-ms-deform-attn"
AS_RELEASED = "pytorch, keys apart"
SHAPES = ("encoder", "decoder")
TIMES = ("forward", "backward", "forward + backward")
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}


@dataclass
class Problem:
    """One operator's input; ``call`` is of one contestant."""

    operator: str
    tensors: dict[str, Tensor]
    levels: tuple[Tensor, Tensor]
    grad_output: Tensor

    def call(self, function: Callable[..., Tensor]) -> Tensor:
        t = self.tensors
        if self.operator == "ms_deform_attn":
            return function(t["value"], *self.levels, t["locations"], t["weights"])
        return function(t["query"], t["value"], t["value"], *self.levels, t["locations"])

    def gradients(self, output: Tensor) -> tuple[Tensor, ...]:
        leaves = [self.tensors[name] for name in LEAVES[self.operator]]
        return torch.autograd.grad(output, leaves, self.grad_output)


@dataclass
class Contestant:
    """A function, and the problem as it takes it."""

    function: Callable[..., Tensor]
    problem: Problem

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.problem.call(self.function)

    def record(self) -> Tensor:
        return self.problem.call(self.function)

    def forward_backward(self) -> tuple[Tensor, ...]:
        output = self.record()
        return output.detach(), *self.problem.gradients(output)


def make_problem(
    operator: str,
    levels: tuple[tuple[int, int], ...],
    queries: int | None,
    batch: int,
    dtype: torch.dtype,
    device: str,
) -> Problem:
    """Queries anywhere, or one at the centre of each token where their number is None."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    tokens = sum(height * width for height, width in levels)
    references = torch.rand(queries or 0, 2, generator=generator)
    if queries is None:
        references = torch.cat([token_centers(*level) for level in levels])
    queries = len(references)
    sizes = torch.tensor([[width, height] for height, width in levels])[:, None]  # [L, 1, 2]
    shape = (batch, queries, HEADS, len(levels), POINTS, 2)
    cells = references[:, None, None, None] * sizes - 0.5
    cells = (cells + 2 * torch.randn(shape, generator=generator)).floor()
    # Away from the cells' centres, where rounding decides which way a gradient goes.
    cells += 0.1 + 0.8 * torch.rand(shape, generator=generator)
    weights = random(*shape[:3], len(levels) * POINTS).softmax(-1).view(shape[:5])
    tensors = {
        "query": random(batch, queries, HEADS, CHANNELS),
        "value": random(batch, tokens, HEADS, CHANNELS),
        "weights": weights,
        # In float32 whatever the value's dtype, as the models have them.
        "locations": ((cells + 0.5) / sizes).to(device, torch.promote_types(dtype, torch.float32)),
    }
    shapes = torch.tensor(levels)
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
    return Problem(
        operator,
        {name: tensor.requires_grad_() for name, tensor in tensors.items()},
        (shapes, starts),
        random(batch, queries, HEADS * CHANNELS),
    )


def token_centers(height: int, width: int) -> Tensor:
    """``[H * W, 2]``, (x, y) in ``[0, 1]``."""
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
    )
    return torch.stack([x.flatten(), y.flatten()], dim=-1)


def contestants(problem: Problem) -> dict[str, Contestant]:
    """The native operator first, which the others are compared with."""
    found = {
        "native": Contestant(getattr(ops, problem.operator), problem),
        "pytorch": Contestant(getattr(ops, f"{problem.operator}_pytorch"), problem),
    }
    if problem.operator == "key_aware_ms_deform_attn":

        def keys_apart(query: Tensor, key: Tensor, value: Tensor, *sampling: Tensor) -> Tensor:
            # Another tensor object, so that it is sampled a second time.
            form = ops.key_aware_ms_deform_attn_pytorch
            return form(query, key.view_as(key), value, *sampling)

        found[AS_RELEASED] = Contestant(keys_apart, problem)
    if problem.operator == "ms_deform_attn" and importlib.util.find_spec("torch_ms_deform_attn"):
        from torch_ms_deform_attn import ms_deform_attn

        # It wants one dtype and one device for all that it is given.
        value, locations = problem.tensors["value"], problem.tensors["locations"]
        same = locations.detach().to(value.dtype).requires_grad_()
        levels = tuple(tensor.to(value.device) for tensor in problem.levels)
        tensors = problem.tensors | {"locations": same}
        adapted = Problem(problem.operator, tensors, levels, problem.grad_output)
        found[OTHER] = Contestant(ms_deform_attn, adapted)
    return found


def check(name: str, contestant: Contestant) -> float:
    """The largest difference from the PyTorch form, of the largest magnitude of each result.

    Raises:
        RuntimeError: it is more than the dtype's rounding explains.
    """
    problem = contestant.problem
    form = Contestant(getattr(ops, f"{problem.operator}_pytorch"), problem)
    # float32: grid_sample places a sample on a map of 134 columns to about 1e-5 cells. 16 bits:
    # the output is rounded, what is computed from it as well.
    dtype = problem.grad_output.dtype
    accepted = {torch.float64: 1e-10, torch.float32: 3e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    names = ("output", *(f"gradient of {leaf}" for leaf in LEAVES[problem.operator]))
    errors = {}
    for result_name, result, expected in zip(
        names, contestant.forward_backward(), form.forward_backward()
    ):
        errors[result_name] = float((result - expected).abs().max() / expected.abs().max())
        if not errors[result_name] <= accepted:
            raise RuntimeError(
                f"{problem.operator}: the {result_name} of {name} is {errors[result_name]:.1e} off "
                f"the PyTorch form's, accepted is {accepted:.1e} of its largest number"
            )
    return max(errors.values())


def seconds(function: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def time_once(contestant: Contestant, measure: str, device: str) -> float:
    if measure == "forward":
        return seconds(contestant.forward, device)
    if measure == "backward":
        output = contestant.record()
        return seconds(lambda: contestant.problem.gradients(output), device)
    return seconds(contestant.forward_backward, device)


def time_in_turns(
    field: dict[str, Contestant], measure: str, device: str, rounds: int, limit: float
) -> dict[str, list[float]]:
    """Seconds of each round; no more rounds than fit into ``limit`` seconds, but three at least."""
    turns = {name: time_once(contestant, measure, device) for name, contestant in field.items()}
    fitting = int(limit / max(sum(turns.values()), 1e-9))
    times: dict[str, list[float]] = {name: [] for name in field}
    for _ in range(max(3, min(rounds, fitting))):
        for name, contestant in field.items():
            times[name].append(time_once(contestant, measure, device))
    return times


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak_memory(function: Callable[[], object], device: str) -> int | None:
    """Bytes in use at the peak of one call, above those before it; None where nothing tells."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = function()
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    results = function()
    del results
    return resident_bytes("VmHWM") - before


def run(args: argparse.Namespace) -> Iterator[dict]:
    """A record for each operator, shape, dtype, batch, number of threads and measure."""
    cases = itertools.product(args.operators, args.shapes, args.dtype, args.batch)
    for operator, shape, dtype, batch in cases:
        queries = args.queries if shape == "decoder" else None
        problem = make_problem(operator, args.levels, queries, batch, DTYPES[dtype], args.device)
        field = contestants(problem)
        errors = {name: check(name, field[name]) for name in field if name != "pytorch"}
        case = dict(operator=operator, shape=shape, dtype=dtype, batch=batch, errors=errors)
        for threads in args.threads:
            torch.set_num_threads(threads)
            for figures in time_records(field, args) + memory_records(field, args.device):
                yield case | dict(threads=threads) | figures


def time_records(field: dict[str, Contestant], args: argparse.Namespace) -> list[dict]:
    records = []
    for measure in TIMES:
        times = time_in_turns(field, measure, args.device, args.rounds, args.seconds)
        medians = {name: 1e3 * statistics.median(of) for name, of in times.items()}
        records.append(record(measure, "ms", medians) | dict(rounds=len(times["native"])))
    return records


def memory_records(field: dict[str, Contestant], device: str) -> list[dict]:
    records = []
    for measure in TIMES[::2]:
        calls = {
            name: contestant.forward if measure == "forward" else contestant.forward_backward
            for name, contestant in field.items()
        }
        sizes = {name: peak_memory(call, device) for name, call in calls.items()}
        if None not in sizes.values():
            mebibytes = {name: size / 2**20 for name, size in sizes.items()}
            records.append(record(f"memory of {measure}", "MiB", mebibytes))
    return records


def record(measure: str, unit: str, values: dict[str, float]) -> dict:
    native = values["native"]
    # A tiny shape may take no page more than was there.
    ratios = {name: value / native if native else None for name, value in values.items()}
    return dict(measure=measure, unit=unit, values=values, ratios_to_native=ratios)


def environment(device: str) -> dict:
    """Where the figures are from."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cuda": torch.cuda.get_device_name() if device == "cuda" else None,
        "instruction set": os.environ.get("LITE_DETR_CPU_CAPABILITY")
        or torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        OTHER: importlib.metadata.version(OTHER)
        if importlib.util.find_spec("torch_ms_deform_attn")
        else None,
    }


COLUMNS = "operator shape dtype batch threads measure".split()


def line(record: dict, names: list[str]) -> list[str]:
    cells = [str(record[column]) for column in COLUMNS]
    for name in names:
        value, ratio = record["values"].get(name), record["ratios_to_native"].get(name)
        cells.append("-" if value is None else f"{value:.2f}")
        cells[-1] += f" ({ratio:.1f}x)" if ratio else ""
    return [*cells[:6], record["unit"], *cells[6:]]


def print_table(records: list[dict]) -> None:
    names = list(dict.fromkeys(name for record in records for name in record["values"]))
    rows = [[*COLUMNS, "unit", *names], *(line(record, names) for record in records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def map_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"given {text}, accepted is HEIGHTxWIDTH like 100x134")
    return int(height), int(width)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    many = dict(nargs="+")
    parser.add_argument("--operators", **many, choices=list(LEAVES), default=list(LEAVES))
    parser.add_argument("--shapes", **many, choices=SHAPES, default=SHAPES)
    parser.add_argument("--levels", **many, type=map_size, default=LEVELS, metavar="HEIGHTxWIDTH")
    parser.add_argument("--queries", type=int, default=900, help="of the decoder")
    parser.add_argument("--batch", **many, type=int, default=[1])
    parser.add_argument("--threads", **many, type=int, default=[torch.get_num_threads()])
    parser.add_argument("--dtype", **many, choices=list(DTYPES), default=["float32"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=15, help="at most; three at least")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each line, about")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args()
    if ops.backend() != "native":
        sys.exit("error: the native operators are not built; docs/kernels.md says how")
    try:
        records = list(tqdm(run(args), unit=" figures", disable=None))
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    where = environment(args.device)
    print(", ".join(f"{name} {value}" for name, value in where.items() if value is not None))
    print_table(records)
    if args.json:
        report = {"environment": where, "levels": args.levels, "records": records}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
