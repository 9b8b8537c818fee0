#!/usr/bin/env python
"""Report what the compiler makes of the CUDA kernels, compared with those of Deformable DETR.

report.py --arch 8.0 9.0                        # needs nvcc, but no GPU
report.py --check --original torch_ms_deform_attn-0.1.1.tar.gz
report.py --original ... --markdown kernels/report.md   # rewrites its tables

The original kernels are those of the source package torch-ms-deform-attn, which pip downloads:

pip download --no-deps --no-binary=:all: --no-build-isolation torch-ms-deform-attn==0.1.1

Resources are as ptxas reports them; spills count bytes stored and loaded. Occupancy is the share of
a multiprocessor's warps that it has room for, given the registers, the shared memory and the
threads of a block, which the compiled code contains.

Instructions are counted in machine code, for heads of 32 channels, 4 levels and 4 points on each:
all that a warp issues from start to end for its queries and heads, divided by their number and by
the 16 points. A warp works for 32 / lanes queries and heads at once; in the original for one, with
a lane for each channel. Loops are recognised by the code's branches. How often they run follows
from the layouts of kernels/cuda/tuning.h, which a compiled program prints; for the original it
follows from its source and the number of points in its innermost loop, each with seven loads. If
there are several, code for remaining points does not count. Otherwise both sides of a branch do, so
that these are the numbers for points with all four corners.

A corner is a row of a value or key that is read: four for a point, and eight with separate keys.
The original has no 16-bit kernels; ours are compared with its float32 kernels.

--check fails if one of our kernels spills, has local memory or more than 16 KiB of shared memory,
in a forward pass issues more instructions for a point than INSTRUCTIONS allows, has room for less
than half of the warps of 8.0 or 9.0 (in float64 a quarter), or loads more than half as often for a
corner as the original does, or in 16-bit types more than a quarter as often. Loads are compared
with --original only, and float64, which serves to check gradients, may issue any number of
instructions.
"""

import argparse
import itertools
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from machine_code import KINDS, MULTIPROCESSORS, WARP, Kernel
from nvcc import compile_original, compile_ours, read_layouts, toolkit, unpack
from tqdm import tqdm

from lite_detr import cli
from lite_detr.analysis.markdown_page import page, write_tables

PROCESSES = 2
DTYPES = ("float32", "float64", "float16", "bfloat16")
# By their names in C++.
TYPE_NAMES = {"float": "float32", "double": "float64", "Float16": "float16", "BFloat16": "bfloat16"}
HEAD_WIDTH, LEVELS, POINTS, CORNERS = 32, 4, 4, 4
# From its source: two coordinates, a weight and four corners.
ORIGINAL_POINT_LOADS = 7
# float64 serves to check gradients, and has no bound of instructions.
OCCUPANCY = {"float32": 0.5, "float64": 0.25, "float16": 0.5, "bfloat16": 0.5}
OCCUPANCY_ON = ("8.0", "9.0")
LOADS_RATIO = {"float32": 0.5, "float16": 0.25, "bfloat16": 0.25}
COUNTED = ("loads", "atomics", "shuffles")
# Bytes of a block.
SHARED = 16 * 1024
# Of forward kernels for a point, by their keys.
INSTRUCTIONS = {"none": 24, "shared": 30, "separate": 50}


def label(kernel: Kernel) -> str:
    return f"{kernel.name}<{', '.join(kernel.arguments)}>"


def describe(kernel: Kernel) -> dict:
    """Describe what a kernel is for, in the words of the report."""
    ours = kernel.name.startswith(("msda", "key_aware", "fused"))
    width, keys = kernel.arguments[-1], ""
    if "key_aware" in kernel.name:
        width, keys = kernel.arguments[1], kernel.arguments[2]
    elif "im2col" in kernel.name and "col2im" not in kernel.name:
        # One kernel for all widths.
        width = "any" if not ours else width
    backward = "backward" in kernel.name or "col2im" in kernel.name
    return {
        "whose": "ours" if ours else "original",
        "attention": kernel.name.rsplit("_", 1)[0].replace("_", "-") if ours else "msda",
        "keys": {"true": "shared", "false": "separate", "": "none"}[keys],
        "pass": "backward" if backward else "forward",
        "dtype": TYPE_NAMES[kernel.arguments[0]],
        "head width": width,
    }


def count_for_point(kernel: Kernel, layouts: dict[str, dict[str, int]]) -> dict[str, float]:
    """Count the instructions that a warp issues for a point of one query and head."""
    code, points, skipped, beside = kernel.code, LEVELS * POINTS, frozenset(), 0
    # Fused kernels have the layout of the others.
    if layout := layouts.get(label(kernel).removeprefix("fused_")):
        pairs, lanes = WARP // layout["lanes"], layout["lanes"]
        trips = (-(-points // lanes), -(-min(lanes, points) // layout["batch"]))
        alone = len(trips)
        trips += (CORNERS / layout["corners"],) if layout["corners"] < CORNERS else ()
        # Forward kernels have a loop for points that may have no corners, and one for others.
        skipped = kernel.code.longer_alternatives()
        # The maximum and the total of the logits.
        beside = 2 if kernel.name.startswith("fused_msda") else 0
    else:
        pairs, alone, innermost = 1, 3, code.innermost()
        batch, rest = divmod(code.loads(innermost), ORIGINAL_POINT_LOADS)
        if rest or not batch or POINTS % batch:
            raise ValueError(f"the innermost loop loads {code.loads(innermost)} times")
        # The outermost loop is for grids that are too small, and runs once.
        trips = (1, LEVELS, POINTS // batch)
        if batch > 1:
            # Remaining points have code of their own, which does not run here.
            rounds = {index for index in code.reachable() if code.rounds_down(index)} - innermost
            skipped = code.skipped_by_a_branch(rounds, kept=innermost)
            if not skipped:
                raise ValueError("remaining points have no code of their own")
    counts = code.executed(trips, alone, skipped, beside)
    return {kind: counts[kind] / (points * pairs) for kind in ("instructions", *COUNTED)}


def record(kernel: Kernel, layouts: dict[str, dict[str, int]]) -> dict:
    """Return all that the report says about a kernel."""
    found = describe(kernel) | {
        "kernel": label(kernel),
        "architecture": kernel.architecture,
        "registers": kernel.registers,
        "spills": kernel.spills,
        "local": kernel.local,
        "shared": kernel.shared,
        "threads": kernel.threads,
        "occupancy": kernel.occupancy,
        "code": {kind: kernel.code.count(kind) for kind in KINDS},
    }
    if found["head width"] in (str(HEAD_WIDTH), "any"):
        try:
            found["for a point"] = counts = count_for_point(kernel, layouts)
        except ValueError as error:
            found["not counted"] = str(error)
        else:
            corners = CORNERS * (2 if found["keys"] == "separate" else 1)
            found["loads for a corner"] = counts["loads"] / corners
    return found


def make_records(
    architectures: Sequence[str], dtypes: Sequence[str], original: Path | None
) -> list[dict]:
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(PROCESSES) as executor:
        folder = Path(name)
        layouts = read_layouts(HEAD_WIDTH, folder)
        makers = [partial(compile_ours, dtype) for dtype in dtypes]
        if original:
            makers.insert(0, partial(compile_original, unpack(original, folder)))
        jobs = list(itertools.product(architectures, makers))
        compiled = executor.map(lambda job: job[1](job[0], folder), jobs)
        kernels = [
            kernel
            for part in tqdm(compiled, total=len(jobs), unit=" files", disable=None)
            for kernel in part
        ]
        records = [record(kernel, layouts) for kernel in kernels]
    compare(records)
    return records


def compare(records: list[dict]) -> None:
    """Add to our kernels how often they load for a corner, relative to the original."""
    theirs = {
        (entry["architecture"], entry["pass"], entry["dtype"]): entry["loads for a corner"]
        for entry in records
        if entry["whose"] == "original" and "for a point" in entry
    }
    for entry in records:
        dtype = "float64" if entry["dtype"] == "float64" else "float32"
        other = theirs.get((entry["architecture"], entry["pass"], dtype))
        if entry["whose"] == "ours" and "for a point" in entry and other:
            entry["loads of the original's"] = entry["loads for a corner"] / other


def violations(records: list[dict]) -> list[str]:
    """Return a line for each bound that one of our kernels exceeds."""
    lines = []
    for entry in (entry for entry in records if entry["whose"] == "ours"):
        code, complaints = entry["code"], []
        if entry["spills"]:
            complaints.append(f"spills {entry['spills']} bytes, accepted are none")
        if entry["local"] or code["local"]:
            complaints.append(
                f"has {entry['local']} bytes of local memory and {code['local']} instructions for "
                "it, accepted are none"
            )
        if entry["shared"] > SHARED:
            complaints.append(
                f"has {entry['shared']} bytes of shared memory, accepted are {SHARED}"
            )
        least = OCCUPANCY[entry["dtype"]]
        if entry["architecture"] in OCCUPANCY_ON and entry["occupancy"] < least:
            complaints.append(
                f"occupies {entry['occupancy']:.0%} of a multiprocessor, accepted are {least:.0%}"
            )
        if "not counted" in entry:
            complaints.append(f"has loops that cannot be counted: {entry['not counted']}")
        if entry["dtype"] != "float64" and entry["pass"] == "forward" and "for a point" in entry:
            issued, most = entry["for a point"]["instructions"], INSTRUCTIONS[entry["keys"]]
            if issued > most:
                complaints.append(
                    f"issues {issued:.1f} instructions for a point, accepted are {most}"
                )
        ratio, most = entry.get("loads of the original's"), LOADS_RATIO.get(entry["dtype"])
        if ratio and most and ratio > most:
            complaints.append(
                f"loads {ratio:.2f} times as often for a corner as the original, accepted is {most}"
            )
        lines += [f"{entry['kernel']} on {entry['architecture']} {line}" for line in complaints]
    return lines


def resources_table(records: list[dict], whose: str) -> str:
    """Return a markdown table: a row for each kernel, a column for each architecture."""
    architectures = list(dict.fromkeys(entry["architecture"] for entry in records))
    kernels: dict[str, dict[str, dict]] = {}
    for entry in (entry for entry in records if entry["whose"] == whose):
        kernels.setdefault(entry["kernel"], {})[entry["architecture"]] = entry
    rows = [
        f"| kernel | threads | {' | '.join(architectures)} |",
        f"|---|---:{'|---:' * len(architectures)}|",
    ]
    for name, found in sorted(kernels.items(), key=lambda item: order(item[1])):
        cells = [resources(found[architecture]) for architecture in architectures]
        threads = next(iter(found.values()))["threads"]
        rows.append(f"| `{name}` | {threads} | {' | '.join(cells)} |")
    return "\n".join(rows)


def order(found: dict[str, dict]) -> tuple:
    entry = next(iter(found.values()))
    width = entry["head width"]
    kernel = entry["kernel"].split("<")[0]
    return kernel, entry["keys"], DTYPES.index(entry["dtype"]), int(width) if width != "any" else 0


def resources(entry: dict) -> str:
    held = [f"{entry[name]} {name}" for name in ("spills", "local", "shared") if entry[name]]
    return ", ".join([f"{entry['registers']} · {entry['occupancy']:.0%}", *held])


def points_table(records: list[dict]) -> str:
    """Return a markdown table: a row for each kernel and the architectures with equal counts."""
    groups: dict[tuple, dict[str, float]] = {}
    counted = [entry for entry in records if "for a point" in entry]
    for entry in sorted(counted, key=lambda entry: order({"": entry})):
        counts, ratio = entry["for a point"], entry.get("loads of the original's")
        cells = [f"{counts[kind]:.2f}" for kind in COUNTED]
        cells += [f"{entry['loads for a corner']:.2f}", f"{ratio:.2f}" if ratio else "–"]
        group = groups.setdefault((entry["kernel"], *cells), {})
        group[entry["architecture"]] = counts["instructions"]
    header = (
        "kernel | architectures | instructions | loads | atomics | shuffles | loads for a corner "
        "| of original's"
    )
    rows = [f"| {header} |", "|---|---|---:|---:|---:|---:|---:|---:|"]
    for (kernel, *cells), found in groups.items():
        least, most = min(found.values()), max(found.values())
        instructions = f"{least:.1f}" if len(found) == 1 else f"{least:.1f} to {most:.1f}"
        rows.append(f"| `{kernel}` | {', '.join(found)} | {instructions} | {' | '.join(cells)} |")
    return "\n".join(rows)


def tables(records: list[dict], where: dict[str, str]) -> str:
    broken = violations(records)
    parts = [
        f"By {', '.join(f'{name} {value}' for name, value in where.items())}:",
        "### Instructions for a point",
        points_table(records),
        "### Registers and occupancy",
        resources_table(records, "ours"),
    ]
    if any(entry["whose"] == "original" for entry in records):
        parts += ["The original:", resources_table(records, "original")]
    parts += ["### Bounds", "\n".join(f"- {line}" for line in broken) or "All are kept."]
    return "\n\n".join(parts)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    known = list(MULTIPROCESSORS)
    add("--arch", nargs="+", choices=known, default=known, help="default: all")
    add("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    add("--original", type=Path, help="the source package, or its folder")
    add("--check", action="store_true", help="exit with status 1 if a bound is exceeded")
    add("--markdown", type=page, help="rewrite the tables of this page")
    add("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args(argv)


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    records = make_records(args.arch, args.dtype, args.original)
    where = {
        "nvcc": toolkit().version,
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "on": platform.machine(),
    }
    text = tables(records, where)
    print(text)
    if args.markdown:
        write_tables(args.markdown, text)
    if args.json:
        args.json.write_text(
            json.dumps({"environment": where, "records": records}, indent=1) + "\n"
        )
    if args.check and (broken := violations(records)):
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
