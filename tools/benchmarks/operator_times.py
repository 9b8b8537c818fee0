#!/usr/bin/env python
"""Split an optimized detector's time on a CPU by kinds of operators.

operator_times.py --config-file dino/lite_dino_r50_h3l1_2p1x3_36ep.py
operator_times.py --config-file A.py --dtype float32 bfloat16 --threads 2 --calls 20

Weights and image are random. Each operator is timed by itself, the dtypes take turns, and figures
are medians over the rounds. If the processor has no arithmetic for bfloat16, its products are
computed in float32, so that the rest of the time is still meaningful; casts do not count.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from calls import environment
from subjects import build_detector
from torch import Tensor

# Private, as is the tree module; torch.profiler could time operators, but not replace a dtype.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from lite_detr import cli
from lite_detr.inference import DTYPES
from lite_detr.inference.optimize import cpu_computes_in, optimize_for_program

PRODUCTS, SAMPLING, NORMS, POINTWISE, COPIES, OTHER = KINDS = (
    "products", "sampling", "norms", "pointwise", "copies", "other",
)  # fmt: skip
COPYING = ("cat", "stack", "clone", "_to_copy", "copy_", "gather", "index", "repeat")
WARM_UP = 1


def kind_of(operator: torch._ops.OpOverload) -> str:
    """Return which of ``KINDS`` an operator belongs to."""
    namespace, name = operator.namespace, operator.overloadpacket.__name__
    if namespace == "lite_detr":
        return SAMPLING
    # Those whose multiply-adds PyTorch counts, and self-attention on CPUs, which it does not count.
    if operator.overloadpacket in flop_registry or "scaled_dot_product" in name:
        return PRODUCTS
    if name.startswith("native_") and name.endswith("_norm"):
        return NORMS
    if name in COPYING:
        return COPIES
    return POINTWISE if torch.Tag.pointwise in operator.tags else OTHER


class OperatorClock(TorchDispatchMode):
    """Times each operator that runs under it.

    Args:
        stand_in: dtype to compute products in, if the weights' is too slow; None changes nothing.

    Attributes:
        seconds: of each kind.
        calls: number and seconds of each operator with the shapes that it took.
    """

    def __init__(self, stand_in: torch.dtype | None = None):
        super().__init__()
        self.stand_in = stand_in
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.calls: dict[str, tuple[int, float]] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kind = kind_of(operator)
        stands_in = kind == PRODUCTS and self.stand_in is not None
        given = cast(args, self.stand_in) if stands_in else args
        start = time.perf_counter()
        results = operator(*given, **(kwargs or {}))
        seconds = time.perf_counter() - start
        self.seconds[kind] += seconds
        text = describe(operator, args)
        number, before = self.calls.get(text, (0, 0.0))
        self.calls[text] = number + 1, before + seconds
        # The tensors of a product have one dtype.
        return cast(results, args[0].dtype) if stands_in else results


def cast(values: Any, dtype: torch.dtype) -> Any:
    """Return the same structure with all its tensors in the dtype."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype), values)


def describe(operator: torch._ops.OpOverload, args: Sequence[Any]) -> str:
    """Return the operator's name and the shapes of its tensors, including those in lists."""
    shapes: list[str] = []
    tree_map_only(Tensor, lambda tensor: shapes.append("x".join(map(str, tensor.shape))), args)
    return " ".join([operator.overloadpacket.__name__, *filter(None, shapes)])


class Subject:
    """A detector in one dtype, and the measurements of each round.

    Raises:
        ConfigError: the config's model is not a detector of this package.
    """

    def __init__(self, config: str, overrides: Sequence[str], dtype: str):
        torch.manual_seed(0)
        self.dtype = dtype
        self.model = optimize_for_program(build_detector(config, overrides), dtype)
        self.stand_in = None if cpu_computes_in(DTYPES[dtype]) else torch.float32
        self.rounds: list[OperatorClock] = []

    @torch.no_grad()
    def turn(self, image: Tensor) -> None:
        with OperatorClock(self.stand_in) as clock:
            self.model([{"image": image}])
        self.rounds.append(clock)

    def milliseconds(self, kind: str) -> float:
        return 1e3 * statistics.median(clock.seconds[kind] for clock in self.rounds[WARM_UP:])

    def slowest(self, number: int) -> list[str]:
        """Return the operators that took most of the last round, a line each."""
        calls = sorted(self.rounds[-1].calls.items(), key=lambda call: -call[1][1])
        return [f"{1e3 * s:8.2f} ms {n:4d}x {text}" for text, (n, s) in calls[:number]]


def table(subjects: Sequence[Subject]) -> str:
    """Return a markdown table: a row for each kind, milliseconds of each dtype."""
    lines = [
        "| operators | " + " | ".join(f"{subject.dtype}, ms" for subject in subjects) + " |",
        "|---" + "|---:" * len(subjects) + "|",
    ]
    times = [[subject.milliseconds(kind) for subject in subjects] for kind in KINDS]
    rows = dict(zip(KINDS, times))
    rows["all but products"] = [sum(column[1:]) for column in zip(*times)]
    rows["all"] = [sum(column) for column in zip(*times)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.1f}" for value in row) + " |")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_config_file(parser)
    add("--size", type=cli.size, default=(800, 1066), metavar="HxW", help="px")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    add("--threads", type=cli.whole_number(1), default=torch.get_num_threads(), help="of the CPU")
    add("--rounds", type=cli.whole_number(1), default=5, help="measured, after one to warm up")
    add("--calls", type=int, default=0, metavar="N", help="also list the N slowest of each dtype")
    cli.add_overrides(parser)
    return parser.parse_intermixed_args(argv)


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    subjects = [Subject(args.config_file, args.opts, dtype) for dtype in args.dtype]
    image = torch.randint(0, 256, (3, *args.size)).float()
    for _ in tqdm(range(WARM_UP + args.rounds), unit="round"):
        for subject in subjects:
            subject.turn(image)
    where = environment("cpu")
    height, width = args.size
    print(
        f"{args.config_file}, optimized, {height}x{width}, {args.threads} threads, {args.rounds} "
        f"rounds; {where['cpu']}, {where['instruction set']}, PyTorch {where['torch']}"
    )
    for subject in subjects:
        if subject.stand_in:
            print(f"{subject.dtype}: products computed in {subject.stand_in}")
    print(f"\n{table(subjects)}")
    if args.calls:
        for subject in subjects:
            print(f"\n{subject.dtype}:", *subject.slowest(args.calls), sep="\n")


if __name__ == "__main__":
    main()
