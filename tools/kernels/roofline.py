#!/usr/bin/env python
"""Compute how fast the CUDA kernels could be on an A100 and an H100. Nothing here is measured.

roofline.py                                    # the encoder of an 800x1066 image
roofline.py --batch 1 --dtype float32 --levels 100x134 50x67
roofline.py --kernels report.json       # from report.py --json

A time is what one part of a GPU takes at its peak rate, if it never waits: a call takes at least
the longest of them. Below there are B images of S tokens, Q queries, M heads of D channels and N
points for each; a number has e bytes, or 4 in float32 sums. R = B S M D are the channels of all
tokens, r = B Q M D those of all queries, and n = B Q M N are all points.

Memory reads each input once, and writes each output once:

  msda, forward         R e + n (8 + e) + r e
  msda, backward        R e + 2 n (8 + e) + r e, and gradients of R
  key-aware, forward    R e + n 8 + 2 r e + B Q M 4
  key-aware, backward   R e + 2 n 8 + 4 r e + B Q M 4, and gradients of R
  gradients of R        R 12: zeros are written, and added to; in 16 bits R 6 to round them

Separate keys count R twice. The L2 cache keeps nothing from one kernel to the next.

Gathers read 4 n D e bytes through the L1 caches, twice that with separate keys. The L2 cache passes
all of memory's bytes, but tokens' rows more than once: each block of threads fetches the rows that
its queries, a tile of a map, sample into an L1 cache of its own. How many these are is an
expectation, for offsets that are normal, with a standard deviation of two cells of each level; a
block then fetches each of its rows once. The backward pass adds 4 n D 4 bytes in the L2 cache,
twice that with separate keys. The cost of additions there is not published: they are assumed to
cost as much as reading.

Operations, where a multiply-add is two: finding a point and its corners' shares takes 12; and

  msda, forward              4 (2 D + 1)
  msda, backward             4 (3 D + 7) + 4
  key-aware, forward         4 (2 D) + 5 D + 6        separate keys: 4 (4 D + 1) + 3 D + 6
  key-aware, backward        4 (7 D + 12) + 5 D + 14  separate keys: 4 (8 D + 13) + 3 D + 14,
                             both with 2 D for each query and head

--kernels adds the time to issue our kernels' instructions, for heads of 32 channels and 16 points:
each of a multiprocessor's four schedulers issues one per cycle. Unlike the others, this is a bound
of what the compiler produced and not of the problem. Both sides of a branch count, as both run if
points have all corners.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from lite_detr import cli
from lite_detr.errors import LiteDetrError
from lite_detr.ops.nvrtc_kernels import tile_size

SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
OPERATORS = ("msda", "key-aware, shared", "key-aware, separate")
PASSES = ("forward", "backward")
# The maps of an 800x1066 image at strides 8 to 64.
ENCODER = ((100, 134), (50, 67), (25, 34), (13, 17))
SCHEDULERS = 4
POINTS = 4  # on each level
# By pass and bytes of a number: the threads of a block over the lanes that work for a query, as in
# kernels/cuda/tuning.h, for heads of 32 channels.
BLOCK_QUERIES = {
    ("forward", 4): 256 // 8,
    ("forward", 2): 256 // 4,
    ("backward", 4): 128 // 8,
    ("backward", 2): 128 // 8,
}
# The standard deviation of offsets in cells, as in tools/benchmarks/operators.py.
SPREAD = 2.0
# Every eighth block is computed, and stands for its neighbours.
SAMPLED_BLOCKS = 8


@dataclass(frozen=True)
class Gpu:
    """Peak rates per second, except those per cycle."""

    architecture: str
    memory: float  # bytes
    operations: float  # of float32, outside of tensor cores
    multiprocessors: int
    clock: float
    l2_cycle: int  # bytes of a cycle
    l1_cycle: int  # of a multiprocessor

    def peaks(self) -> dict[str, float]:
        return {
            "memory": self.memory,
            "L2": self.l2_cycle * self.clock,
            "L1": self.l1_cycle * self.clock * self.multiprocessors,
            "float32": self.operations,
            "issue": SCHEDULERS * self.clock * self.multiprocessors,
        }


# From data sheets: memory, operations. From architecture whitepapers: multiprocessors, boost
# clocks, the bytes per cycle of the A100's L2 cache (5,120) and of its L1 caches. None is published
# for the H100: the same is assumed, at its clock, which is more than others have measured.
GPUS = {
    "A100 SXM 80 GB": Gpu("8.0", 2039e9, 19.5e12, 108, 1.41e9, 5120, 128),
    "H100 SXM": Gpu("9.0", 3350e9, 66.9e12, 132, 1.98e9, 5120, 128),
}


@dataclass(frozen=True)
class Geometry:
    batch: int
    tokens: int
    queries: int
    heads: int
    channels: int
    points: int  # on all levels


@cache
def fetched_rows(levels: tuple[tuple[int, int], ...], queries: int, spread: float) -> float:
    """Return how many rows of a head the blocks of an encoder's call fetch, on average.

    Args:
        levels: height and width of each.
        queries: of a block, a power of two.
        spread: the standard deviation of offsets in cells.
    """

    def reached(centers: torch.Tensor, cells: int) -> torch.Tensor:
        """Return how likely a point lies less than a cell from each cell: ``[Q, cells]``."""
        distances = torch.arange(cells) - (centers[:, None] * cells - 0.5)
        ndtr = torch.special.ndtr
        return ndtr((distances + 1) / spread) - ndtr((distances - 1) / spread)

    tile_height, tile_width = tile_size(queries)
    blocks = []
    for height, width in levels:
        y, x = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
        blocks += [
            torch.cartesian_prod(rows, columns).view(-1, 2).double()
            for rows in y.split(tile_height)
            for columns in x.split(tile_width)
        ]
    sampled = blocks[:: min(SAMPLED_BLOCKS, len(blocks))]
    rows = 0.0
    for block in sampled:
        for height, width in levels:
            y, x = reached(block[:, 0], height), reached(block[:, 1], width)
            missed = (1 - y[:, :, None] * x[:, None, :]).prod(0) ** POINTS
            rows += (1 - missed).sum().item()
    return rows * sum(map(len, blocks)) / sum(map(len, sampled))


def cost(
    geometry: Geometry, operator: str, direction: str, size: int, fetched: float
) -> dict[str, float]:
    """Return what a call takes: bytes of memory, L2 and L1, and operations, as described above.

    Args:
        size: bytes of a number.
        fetched: rows of a head of an image that the L1 caches fetch.
    """
    p = geometry
    pairs = p.batch * p.queries * p.heads
    points, own = pairs * p.points, pairs * p.channels
    rows = p.batch * p.tokens * p.heads * p.channels
    msda, backward = operator == "msda", direction == "backward"
    sampled = 2 if operator.endswith("separate") else 1

    place = 8 + size if msda else 8
    memory = sampled * rows * size + points * place * (2 if backward else 1)
    if msda:
        memory += own * size
    else:
        memory += own * size * (4 if backward else 2) + pairs * 4
    again = sampled * p.batch * p.heads * p.channels * size * (fetched - p.tokens)
    added = 0
    if backward:
        memory += sampled * rows * (12 if size == 4 else 12 + 6)
        added = sampled * 4 * points * p.channels * 4

    d = p.channels
    for_point = {
        ("msda", "forward"): 4 * (2 * d + 1),
        ("msda", "backward"): 4 * (3 * d + 7) + 4,
        ("key-aware, shared", "forward"): 4 * (2 * d) + 5 * d + 6,
        ("key-aware, separate", "forward"): 4 * (4 * d + 1) + 3 * d + 6,
        ("key-aware, shared", "backward"): 4 * (7 * d + 12) + 5 * d + 14,
        ("key-aware, separate", "backward"): 4 * (8 * d + 13) + 3 * d + 14,
    }[operator, direction]
    for_pair = 2 * d if backward and not msda else 0
    return {
        "memory": memory,
        "L2": memory + again + added,
        "L1": sampled * 4 * points * d * size,
        "float32": points * (12 + for_point) + pairs * for_pair,
    }


def instructions(records: list[dict], architecture: str, operator: str, direction: str, dtype: str):
    """Return those of a point of a query and head, from the records of ``report.py --json``."""
    attention, _, keys = operator.partition(", ")
    wanted = {
        "whose": "ours",
        "architecture": architecture,
        "attention": attention,
        "keys": keys or "none",
        "pass": direction,
        "dtype": dtype,
    }
    for entry in records:
        if "for a point" in entry and wanted.items() <= entry.items():
            return entry["for a point"]["instructions"]
    raise LiteDetrError(f"the report lacks {wanted}; make it with all architectures and dtypes")


def times(costs: dict[str, float], gpu: Gpu) -> dict[str, float]:
    """Return the microseconds of each part of a GPU."""
    peaks = gpu.peaks()
    return {part: 1e6 * amount / peaks[part] for part, amount in costs.items()}


def table(header: list[str], rows: list[list[str]], words: int) -> str:
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


@dataclass(frozen=True)
class Encoder:
    """An encoder's calls: a query at each token, in 8 heads of 32 channels."""

    levels: tuple[tuple[int, int], ...]

    def geometry(self, batch: int) -> Geometry:
        tokens = sum(height * width for height, width in self.levels)
        points = POINTS * len(self.levels)
        return Geometry(batch, tokens, tokens, heads=8, channels=32, points=points)

    def cost(self, batch: int, operator: str, direction: str, size: int) -> dict[str, float]:
        fetched = fetched_rows(self.levels, BLOCK_QUERIES[direction, size], SPREAD)
        return cost(self.geometry(batch), operator, direction, size, fetched)


def query_table(encoder: Encoder, dtypes: list[str]) -> str:
    """Return a markdown table of what one query takes, with all heads."""
    rows = []
    for operator in OPERATORS:
        for direction in PASSES:
            for dtype in dtypes:
                costs = encoder.cost(1, operator, direction, SIZES[dtype])
                queries = encoder.geometry(1).queries
                figures = [costs[part] for part in ("memory", "L2", "L1", "float32")]
                cells = [f"{figure / queries / 1e3:.1f}" for figure in figures]
                rows.append([operator, direction, dtype, *cells])
    header = "attention, pass, dtype, memory (kB), L2 (kB), gathered (kB), operations (1000)"
    return table(header.split(", "), rows, words=3)


def time_table(
    gpu: Gpu, encoder: Encoder, batches: list[int], dtypes: list[str], records: list[dict]
) -> str:
    rows = []
    for operator in OPERATORS:
        for direction in PASSES:
            for dtype in dtypes:
                for batch in batches:
                    costs = encoder.cost(batch, operator, direction, SIZES[dtype])
                    if records:
                        p = encoder.geometry(batch)
                        points = p.queries * p.heads * p.points * p.batch
                        costs["issue"] = points * instructions(
                            records, gpu.architecture, operator, direction, dtype
                        )
                    parts = times(costs, gpu)
                    cells = [f"{microseconds:.0f}" for microseconds in parts.values()]
                    bound = max(parts, key=parts.get)
                    rows.append(
                        [operator, direction, dtype, bound, str(batch)]
                        + [*cells, f"**{parts[bound]:.0f}**"]
                    )
    parts = ["memory", "L2", "L1", "float32", *(["issue"] if records else [])]
    header = ["attention", "pass", "dtype", "bound by", "batch", *parts, "at least"]
    return table(header, rows, words=4)


def read_records(path: Path) -> list[dict]:
    """Return the kernels that report.py wrote to a file.

    Raises:
        LiteDetrError: the file cannot be read, or is something else.
    """
    try:
        return json.loads(path.read_text())["records"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise LiteDetrError(
            f"--kernels {path} is not a file that report.py --json wrote: {error!r}"
        ) from error


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__)
    add, many = parser.add_argument, dict(nargs="+")
    add("--levels", **many, type=cli.size, default=ENCODER, metavar="HEIGHTxWIDTH")
    add("--batch", **many, type=cli.whole_number(1), default=[1, 16])
    add("--dtype", **many, choices=list(SIZES), default=["float32", "bfloat16"])
    add("--kernels", type=Path, help="what report.py --json wrote")
    args = parser.parse_args(argv)
    records = read_records(args.kernels) if args.kernels else []
    tokens = sum(height * width for height, width in args.levels)
    if records and len(args.levels) != len(ENCODER):
        parser.error(f"--kernels is for {len(ENCODER)} levels, given {len(args.levels)}")
    encoder = Encoder(tuple(args.levels))
    print(
        f"Computed, not measured. {tokens:,} queries and tokens, 8 heads of 32 channels, "
        f"{len(args.levels)} levels with 4 points each, offsets of {SPREAD:g} cells.\n\n"
        "For one query:\n"
    )
    print(query_table(encoder, args.dtype))
    for name, gpu in GPUS.items():
        print(f"\nOn an {name}, in microseconds:\n")
        print(time_table(gpu, encoder, args.batch, args.dtype, records))


if __name__ == "__main__":
    main()
