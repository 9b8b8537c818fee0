#!/usr/bin/env python
"""Compare what NVRTC makes of the CUDA kernels at run time with what nvcc builds of them.

compare_nvrtc.py --arch 8.0 9.0 --dtype float32     # needs nvcc, but no GPU

Registers, bytes of spills and instructions for a point are those of report.py, for which see its
help. Each row is for all kernels of an architecture and a type. With --check, NVRTC's kernels are
held to the bounds of report.py --check.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from machine_code import MULTIPROCESSORS
from nvcc import compile_by_nvrtc, compile_ours, read_layouts
from report import DTYPES, HEAD_WIDTH, record, violations

from lite_detr import cli


def compare(architecture: str, dtype: str, folder: Path) -> list[tuple[dict, dict]]:
    """Return the records of each kernel, by nvcc and by NVRTC."""
    layouts = read_layouts(HEAD_WIDTH, folder)
    built, compiled = (
        {entry["kernel"]: entry for entry in (record(kernel, layouts) for kernel in kernels)}
        for kernels in (
            compile_ours(dtype, architecture, folder),
            compile_by_nvrtc(dtype, architecture, folder),
        )
    )
    assert built.keys() == compiled.keys()
    return [(built[name], compiled[name]) for name in built]


def row(architecture: str, dtype: str, pairs: list[tuple[dict, dict]]) -> str:
    """Return a row of a markdown table."""
    registers = [ours["registers"] - built["registers"] for built, ours in pairs]
    spills = [sum(pair[place]["spills"] for pair in pairs) for place in (0, 1)]
    counted = [
        ours["for a point"]["instructions"] / built["for a point"]["instructions"]
        for built, ours in pairs
        if "for a point" in built and "for a point" in ours
    ]
    cells = [
        architecture,
        dtype,
        len(pairs),
        sum(not difference for difference in registers),
        f"{min(registers):+d} to {max(registers):+d}",
        f"{spills[0]}, {spills[1]}",
        f"{min(counted):.3f} to {max(counted):.3f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add, known = parser.add_argument, list(MULTIPROCESSORS)
    add("--arch", nargs="+", choices=known, default=known, help="default: all")
    add("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    add("--check", action="store_true", help="exit with status 1 if NVRTC's exceed a bound")
    return parser.parse_args(argv)


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    header = (
        "architecture | type | kernels | equal registers | other registers | "
        "bytes of spills, nvcc and NVRTC | instructions of NVRTC's"
    )
    print(f"| {header} |\n|{'---|' * 7}")
    complaints = []
    for architecture in args.arch:
        for dtype in args.dtype:
            with tempfile.TemporaryDirectory() as folder:
                pairs = compare(architecture, dtype, Path(folder))
            print(row(architecture, dtype, pairs), flush=True)
            complaints += violations([compiled for _, compiled in pairs])
    if args.check and complaints:
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
