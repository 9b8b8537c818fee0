#!/usr/bin/env python
"""Time the sampling operators: native, in PyTorch and, if installed, torch-ms-deform-attn's.

operators.py --batch 1 4 --threads 1 2 --json kernels.json   # the whole of it, on the CPU
operators.py --shapes decoder --dtype float32 bfloat16       # a part
operators.py --device cuda --batch 1 16 --dtype float32 float16 bfloat16

The encoder's shape has a query for each token, the decoder's has --queries. Queries look a few
cells around their references, in 8 heads of 32 channels, at 4 points on each level. The key of
key-aware attention is the value, as in the released models. Their code samples it twice, once as
the key and once as the value: "pytorch, separate keys" does the same. The fused operators, which
modules call, take the same points by offsets, and logits; "in steps" computes locations and the
softmax in PyTorch, and calls the native operator.

Contestants are checked against the PyTorch form before they are timed. They take turns, so that
whatever else the machine does affects all of them alike. Figures are medians over all calls, in
milliseconds, with the ratio to the native operator in brackets. Backward is timed on a graph that
was made before.

On a GPU a turn has up to ten calls, each between two events, after one to warm up. The L2 cache is
overwritten before each call: it would hold a decoder's tokens, which in a model the projections
before may or may not have left there, so figures are the worse case. Calls are queued while another
kernel keeps the GPU busy: figures are the GPU's own time, not the host's. Events are exact to about
half a microsecond.

The native forward pass gathers four rows for each point, counting those outside the maps; the rate
is in GB/s. What exceeds the memory's bandwidth comes from the caches.

Memory is the peak of one call above what was in use before it, with results and gradients, in MiB.
On CUDA it is the allocator's count. On the CPU it is Linux's count of the process's resident pages
(VmHWM), reset before each call, after malloc has returned what it keeps of freed blocks: this also
counts memory that a kernel takes without PyTorch's allocator.

Every record of the JSON file has the same keys; "threads" is null on a GPU.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from calls import check_device, environment, naming, peak_memory, time_turn
from torch import Tensor
from tqdm import tqdm

from lite_detr import cli, ops
from lite_detr.errors import LiteDetrError
from lite_detr.ops.sampling import locate_on_levels

HEADS, CHANNELS, POINTS = 8, 32, 4
# The maps of an 800x1066 image at strides 8 to 64.
LEVELS = ((100, 134), (50, 67), (25, 34), (13, 17))
LEAVES = {
    "ms_deform_attn": ("value", "locations", "weights"),
    "key_aware_ms_deform_attn": ("query", "value", "locations"),
    "fused_ms_deform_attn": ("value", "offsets", "logits"),
    "fused_key_aware_ms_deform_attn": ("query", "value", "offsets"),
}
OTHER = "torch-ms-deform-attn"
AS_RELEASED = "pytorch, separate keys"
IN_STEPS = "in steps"
SHAPES = ("encoder", "decoder")
TIMES = ("forward", "backward", "forward + backward")
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}


@dataclass
class Problem:
    """The input of one operator."""

    operator: str
    tensors: dict[str, Tensor]
    levels: tuple[Tensor, Tensor]
    sizes: tuple[tuple[int, int], ...]
    grad_output: Tensor

    def call(self, function: Callable[..., Tensor]) -> Tensor:
        t = self.tensors
        if self.operator == "fused_ms_deform_attn":
            points = (self.sizes, t["references"], t["offsets"], t["logits"])
            return function(t["value"], *points)
        if self.operator == "fused_key_aware_ms_deform_attn":
            points = (self.sizes, t["references"], t["offsets"])
            return function(t["query"], t["value"], t["value"], *points)
        if self.operator == "ms_deform_attn":
            return function(t["value"], *self.levels, t["locations"], t["weights"])
        return function(t["query"], t["value"], t["value"], *self.levels, t["locations"])

    def gradients(self, output: Tensor, again: bool = False) -> tuple[Tensor, ...]:
        """Return the gradients of an output; ``again`` keeps its graph for another time."""
        leaves = [self.tensors[name] for name in LEAVES[self.operator]]
        return torch.autograd.grad(output, leaves, self.grad_output, retain_graph=again)

    def gathered_bytes(self) -> int:
        """Return the bytes of the rows at the four corners of each point."""
        value, locations = self.tensors["value"], self.tensors["locations"]
        row = value.shape[-1] * value.element_size()
        return locations[..., 0].numel() * 4 * row


@dataclass
class Contestant:
    """A function, and the problem in the form that it takes."""

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
    """Make a random problem.

    Args:
        queries: their number, at random places; None puts one at the centre of each token.
    """
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
    # Away from the cells' centres, where rounding decides the direction of a gradient.
    cells += 0.1 + 0.8 * torch.rand(shape, generator=generator)
    weights = random(*shape[:3], len(levels) * POINTS).softmax(-1).view(shape[:5])
    locations = (cells + 0.5) / sizes
    references = references.expand(batch, len(levels), queries, 2).transpose(1, 2)
    offsets = (locations - references[:, :, None, :, None]) * sizes
    # At least float32, as in the models.
    exact = torch.promote_types(dtype, torch.float32)
    tensors = {
        "query": random(batch, queries, HEADS, CHANNELS),
        "value": random(batch, tokens, HEADS, CHANNELS),
        "weights": weights,
        "locations": locations.to(device, exact),
        "references": references.to(device, exact).contiguous(),
        "offsets": offsets.to(device, dtype),
        "logits": weights.log(),
    }
    shapes = torch.tensor(levels)
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
    return Problem(
        operator,
        # Reference points of an encoder need no gradient.
        {name: tensor.requires_grad_(name != "references") for name, tensor in tensors.items()},
        (shapes, starts),
        tuple(levels),
        random(batch, queries, HEADS * CHANNELS),
    )


def token_centers(height: int, width: int) -> Tensor:
    """Return ``[H * W, 2]``, (x, y) in ``[0, 1]``."""
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
    )
    return torch.stack([x.flatten(), y.flatten()], dim=-1)


def contestants(problem: Problem) -> dict[str, Contestant]:
    """Return the contestants by name; the others are compared with the first, the native one."""
    found = {
        "native": Contestant(getattr(ops, problem.operator), problem),
        "pytorch": Contestant(getattr(ops, f"{problem.operator}_pytorch"), problem),
    }
    if problem.operator == "key_aware_ms_deform_attn":

        def separate_keys(query: Tensor, key: Tensor, value: Tensor, *sampling: Tensor) -> Tensor:
            # Another tensor object, which is sampled by itself.
            form = ops.key_aware_ms_deform_attn_pytorch
            return form(query, key.view_as(key), value, *sampling)

        found[AS_RELEASED] = Contestant(separate_keys, problem)
    if problem.operator.startswith("fused"):
        found[IN_STEPS] = Contestant(steps(problem.operator), problem)
    if problem.operator == "ms_deform_attn" and other_runs_on(problem.grad_output.device):
        from torch_ms_deform_attn import ms_deform_attn

        # It takes one dtype and one device for all arguments.
        value, locations = problem.tensors["value"], problem.tensors["locations"]
        same = locations.detach().to(value.dtype).requires_grad_()
        levels = tuple(tensor.to(value.device) for tensor in problem.levels)
        tensors = problem.tensors | {"locations": same}
        adapted = Problem(problem.operator, tensors, levels, problem.grad_output)
        found[OTHER] = Contestant(ms_deform_attn, adapted)
    return found


def steps(operator: str) -> Callable[..., Tensor]:
    """Return what a fused operator replaces: PyTorch around the native operator."""
    native = getattr(ops, operator.removeprefix("fused_"))

    def msda(value: Tensor, *points: object) -> Tensor:
        *places, logits = points
        weights = logits.flatten(3).softmax(-1).view_as(logits)
        return native(value, *locate_on_levels(*places), weights)

    def key_aware(query: Tensor, key: Tensor, value: Tensor, *places: object) -> Tensor:
        return native(query, key, value, *locate_on_levels(*places))

    return key_aware if "key_aware" in operator else msda


def other_runs_on(device: torch.device) -> bool:
    """Return whether torch-ms-deform-attn is installed, and built for a device."""
    if not importlib.util.find_spec("torch_ms_deform_attn"):
        return False
    from torch_ms_deform_attn import _C

    return device.type == "cpu" or _C.with_cuda


def check(name: str, contestant: Contestant) -> float:
    """Return the largest difference from the PyTorch form, relative to a result's largest number.

    Raises:
        LiteDetrError: it is more than the dtype's rounding explains.
    """
    problem = contestant.problem
    form = Contestant(getattr(ops, f"{problem.operator}_pytorch"), problem)
    # float32: grid_sample locates a sample on a map of 134 columns to about 1e-5 cells. 16 bits:
    # the output is rounded, and so is what is computed from it.
    dtype = problem.grad_output.dtype
    accepted = {torch.float64: 1e-10, torch.float32: 3e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    names = ("output", *(f"gradient of {leaf}" for leaf in LEAVES[problem.operator]))
    errors = {}
    for result_name, result, expected in zip(
        names, contestant.forward_backward(), form.forward_backward()
    ):
        errors[result_name] = float((result - expected).abs().max() / expected.abs().max())
        if not errors[result_name] <= accepted:
            raise LiteDetrError(
                f"{problem.operator}: the {result_name} of {name} is {errors[result_name]:.1e} off "
                f"the PyTorch form's, accepted is {accepted:.1e} of its largest number"
            )
    return max(errors.values())


def time_contestant(contestant: Contestant, measure: str, device: str) -> list[float]:
    if measure == "forward":
        return time_turn(contestant.forward, device)
    if measure == "backward":
        output = contestant.record()
        several = device == "cuda"
        return time_turn(lambda: contestant.problem.gradients(output, several), device)
    return time_turn(contestant.forward_backward, device)


def time_in_turns(
    field: dict[str, Contestant], measure: str, device: str, rounds: int, limit: float
) -> dict[str, list[list[float]]]:
    """Return the seconds of the calls of each round, after one to warm up.

    There are no more rounds than fit into ``limit`` seconds, but at least three.
    """
    start = time.perf_counter()
    for contestant in field.values():
        time_contestant(contestant, measure, device)
    fitting = int(limit / max(time.perf_counter() - start, 1e-9))
    times: dict[str, list[list[float]]] = {name: [] for name in field}
    for _ in range(max(3, min(rounds, fitting))):
        for name, contestant in field.items():
            times[name].append(time_contestant(contestant, measure, device))
    return times


def run(args: argparse.Namespace) -> Iterator[dict]:
    """Yield a record for each operator, shape, dtype, batch, number of threads and measure."""
    cases = itertools.product(args.operators, args.shapes, args.dtype, args.batch)
    for operator, shape, dtype, batch in cases:
        with naming(f"{operator}, {shape}, {dtype}, batch {batch}"):
            yield from run_case(operator, shape, dtype, batch, args)


def run_case(
    operator: str, shape: str, dtype: str, batch: int, args: argparse.Namespace
) -> Iterator[dict]:
    queries = args.queries if shape == "decoder" else None
    problem = make_problem(operator, args.levels, queries, batch, DTYPES[dtype], args.device)
    field = contestants(problem)
    errors = {name: check(name, field[name]) for name in field if name != "pytorch"}
    case = dict(operator=operator, shape=shape, dtype=dtype, batch=batch, errors=errors)
    for threads in args.threads:
        if threads is not None:
            torch.set_num_threads(threads)
        for figures in time_records(field, args) + memory_records(field, args.device):
            yield case | dict(threads=threads) | figures


def time_records(field: dict[str, Contestant], args: argparse.Namespace) -> list[dict]:
    records = []
    for measure in TIMES:
        times = time_in_turns(field, measure, args.device, args.rounds, args.seconds)
        rounds = len(times["native"])
        calls = {name: list(itertools.chain(*of)) for name, of in times.items()}
        medians = {name: 1e3 * statistics.median(of) for name, of in calls.items()}
        counts = {name: len(of) for name, of in calls.items()}
        records.append(record(measure, "ms", medians, rounds, counts))
        if measure == "forward":
            gathered = field["native"].problem.gathered_bytes() / medians["native"] / 1e6
            only = {"native": counts["native"]}
            values = {"native": gathered}
            records.append(record("gathered in forward", "GB/s", values, rounds, only))
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
            counts = dict.fromkeys(calls, 1)
            records.append(record(f"memory of {measure}", "MiB", mebibytes, 1, counts))
    return records


def record(
    measure: str, unit: str, values: dict[str, float], rounds: int, calls: dict[str, int]
) -> dict:
    native = values["native"]
    # A tiny shape may take no additional page.
    ratios = {name: value / native if native else None for name, value in values.items()}
    return dict(
        measure=measure,
        unit=unit,
        values=values,
        ratios_to_native=ratios,
        rounds=rounds,
        calls=calls,
    )


COLUMNS = "operator shape dtype batch threads measure".split()


def line(record: dict, names: list[str]) -> list[str]:
    cells = ["-" if record[column] is None else str(record[column]) for column in COLUMNS]
    for name in names:
        value, ratio = record["values"].get(name), record["ratios_to_native"].get(name)
        cells.append("-" if value is None else f"{value:.{2 if value >= 1 else 4}f}")
        cells[-1] += f" ({ratio:.1f}x)" if ratio else ""
    return [*cells[:6], record["unit"], *cells[6:]]


def print_table(records: list[dict]) -> None:
    names = list(dict.fromkeys(name for record in records for name in record["values"]))
    rows = [[*COLUMNS, "unit", *names], *(line(record, names) for record in records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add, many = parser.add_argument, dict(nargs="+")
    positive = cli.whole_number(1)
    add("--operators", **many, choices=list(LEAVES), default=list(LEAVES))
    add("--shapes", **many, choices=SHAPES, default=SHAPES)
    add("--levels", **many, type=cli.size, default=LEVELS, metavar="HEIGHTxWIDTH")
    add("--queries", type=positive, default=900, help="of the decoder")
    add("--batch", **many, type=positive, default=[1])
    add("--threads", **many, type=positive, help="of the CPU (default: PyTorch's number)")
    add("--dtype", **many, choices=list(DTYPES), default=["float32"])
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--rounds", type=positive, default=15, help="at most, and never less than three")
    add("--seconds", type=float, default=30.0, help="for each line, about")
    add("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    if args.device == "cuda" and args.threads:
        parser.error("--threads is for --device cpu")
    if args.threads is None:
        args.threads = [None if args.device == "cuda" else torch.get_num_threads()]
    return args


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    check_device(args.device, native=True)
    records = list(tqdm(run(args), unit=" figures", disable=None))
    where = environment(args.device)
    has_other = importlib.util.find_spec("torch_ms_deform_attn")
    where[OTHER] = importlib.metadata.version(OTHER) if has_other else None
    print(", ".join(f"{name} {value}" for name, value in where.items() if value is not None))
    print_table(records)
    if args.json:
        report = {"environment": where, "levels": args.levels, "records": records}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
