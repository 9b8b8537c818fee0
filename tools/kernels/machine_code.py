"""The resources, occupancy and instructions of compiled CUDA kernels.

They are read from a cubin by ``nvdisasm`` and ``cuobjdump``, and from the output of
``nvcc -Xptxas -v``.
"""

import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from lite_detr.errors import LiteDetrError

WARP = 32


@dataclass(frozen=True)
class Multiprocessor:
    """The capacity of one multiprocessor."""

    threads: int
    blocks: int
    shared: int  # bytes
    # What the system takes of it for each block, and the step in which it is handed out.
    shared_reserved: int = 1024
    shared_step: int = 128


# CUDA C++ Programming Guide, compute capabilities, table of technical specifications; steps and
# numbers of blocks are also in the toolkit's cuda_occupancy.h.
MULTIPROCESSORS = {
    "7.5": Multiprocessor(1024, 16, 64 * 1024, shared_reserved=0, shared_step=256),
    "8.0": Multiprocessor(2048, 32, 164 * 1024),
    "8.6": Multiprocessor(1536, 16, 100 * 1024),
    "8.9": Multiprocessor(1536, 24, 100 * 1024),
    "9.0": Multiprocessor(2048, 32, 228 * 1024),
    "10.0": Multiprocessor(2048, 32, 228 * 1024),
    "12.0": Multiprocessor(1536, 24, 100 * 1024),
}
# All of these give a quarter of the registers to each of four schedulers, which share the warps of
# a block.
SCHEDULERS, REGISTERS, REGISTER_STEP = 4, 65536, 256


def occupancy(architecture: str, registers: int, threads: int, shared: int) -> float:
    """Return the share of a multiprocessor's warps that blocks of ``threads`` of a kernel fill.

    Args:
        registers: of a thread.
        shared: bytes of a block.
    """
    limits = MULTIPROCESSORS[architecture]
    warps = -(-threads // WARP)
    blocks = [limits.blocks, limits.threads // (warps * WARP)]
    registers_of_warp = _round_up(registers * WARP, REGISTER_STEP)
    blocks.append(REGISTERS // SCHEDULERS // registers_of_warp * SCHEDULERS // warps)
    shared_of_block = _round_up(shared + limits.shared_reserved, limits.shared_step)
    if shared_of_block:
        blocks.append(limits.shared // shared_of_block)
    return min(blocks) * warps * WARP / limits.threads


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


# Kinds of instructions by the first part of their names. REDUX is not one of them: it reduces
# registers of a warp.
KINDS = {
    "loads": ("LDG", "LD"),
    "stores": ("STG", "ST"),
    "atomics": ("RED", "REDG", "ATOM", "ATOMG"),
    "shuffles": ("SHFL",),
    "local": ("LDL", "STL"),
    "shared": ("LDS", "LDSM", "STS", "ATOMS"),
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}

FUNCTION = re.compile(r"^\.text\.(\S+):$")
LABEL = re.compile(r"^(\.\S+):$")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(\S+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
TARGET = re.compile(r"`\((\.L\S*)\)")


@dataclass(frozen=True)
class Instruction:
    name: str
    kind: str | None
    # The label that it may branch to, and whether the next instruction may follow.
    target: str | None
    goes_on: bool


@dataclass
class Code:
    """The instructions of a kernel, and the loops that they are in."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def append(self, guard: str | None, name: str, operands: str) -> None:
        root = name.split(".")[0]
        target, goes_on = None, True
        match = TARGET.search(operands)
        if match and root in ("BRA", "CALL") and not name.startswith("BRA.DIV"):
            # A call of a label that is not a function is a distant jump. BRA.DIV is for warps whose
            # lanes have diverged; lanes of these kernels stay together.
            target = match[1]
            goes_on = guard is not None or match[0] != operands
        elif root in ("BRX", "JMP", "JMX"):
            raise ValueError(f"cannot follow the computed branch {name} {operands}")
        elif root in ("EXIT", "RET"):
            goes_on = guard is not None
        self.instructions.append(Instruction(name, KIND_OF.get(root), target, goes_on))

    def successors(self, index: int) -> Iterator[int]:
        instruction = self.instructions[index]
        if instruction.target is not None:
            yield self.labels[instruction.target]
        if instruction.goes_on and index + 1 < len(self.instructions):
            yield index + 1

    def reachable(
        self, without: int | None = None, step: tuple[int, int] | None = None
    ) -> set[int]:
        """Return the first instruction and all that it leads to.

        Args:
            without: an instruction to leave out.
            step: a step from one instruction to another to leave out.
        """
        found = {0} - {without}
        waiting = list(found)
        while waiting:
            index = waiting.pop()
            for after in self.successors(index):
                if after not in found and after != without and (index, after) != step:
                    found.add(after)
                    waiting.append(after)
        return found

    def loops(self) -> list[frozenset[int]]:
        """Return the natural loops: instructions that lead back to one that always comes first."""
        reachable = self.reachable()
        before = defaultdict(list)
        for index in sorted(reachable):
            for after in self.successors(index):
                before[after].append(index)
        loops = []
        for head in sorted(reachable & set(self.labels.values())):
            ends = [end for end in before[head] if end not in self.reachable(without=head)]
            body, waiting = {head, *ends}, [end for end in ends if end != head]
            while waiting:
                for index in before[waiting.pop()]:
                    if index not in body:
                        body.add(index)
                        waiting.append(index)
            if ends:
                loops.append(frozenset(body))
        return loops

    def memory_loops(self) -> list[frozenset[int]]:
        """Return the loops that access global memory."""
        kinds = ("loads", "atomics")
        return [
            loop
            for loop in self.loops()
            if any(self.instructions[index].kind in kinds for index in loop)
        ]

    def innermost(self) -> frozenset[int]:
        """Return the innermost loop that accesses global memory."""
        loops = self.memory_loops()
        return min(loops, key=lambda loop: (-sum(loop <= other for other in loops), len(loop)))

    def longer_alternatives(self) -> set[int]:
        """Return the loops at the second depth that have a shorter one beside them."""
        loops = self.memory_loops()
        second = [loop for loop in loops if sum(loop <= other for other in loops) == 2]
        return set().union(*sorted(second, key=len)[1:])

    def skipped_by_a_branch(self, marked: Set[int], kept: Set[int]) -> set[int]:
        """Return the most that a branch can skip with all of ``marked`` and nothing of ``kept``."""
        reachable, largest = self.reachable(), set()
        for index in reachable:
            steps = list(self.successors(index))
            for after in steps if len(steps) > 1 else ():
                skipped = reachable - self.reachable(step=(index, after))
                if marked <= skipped and not kept & skipped and len(skipped) > len(largest):
                    largest = skipped
        return largest

    def rounds_down(self, index: int) -> bool:
        return "FLOOR" in self.instructions[index].name

    def loads(self, indices: Set[int]) -> int:
        return sum(self.instructions[index].kind == "loads" for index in indices)

    def executed(
        self,
        trips: Sequence[float],
        alone: int,
        skipped: Set[int] = frozenset(),
        beside: int = 0,
    ) -> Counter[str]:
        """Count the instructions that a warp issues from start to end, by kind and in total.

        Both sides of branches count, and so do predicated instructions, which are issued as well.

        Args:
            trips: how often each loop that accesses global memory runs, from the outermost to the
                innermost.
            alone: the number of outer loops that must exist, with no other loop beside them.
            skipped: instructions that do not run.
            beside: the number of loops that stand before or after the outermost one and run as
                often as it does.

        Raises:
            ValueError: the code has other loops.
        """
        loops = [loop for loop in self.memory_loops() if not loop <= skipped]
        depths = sorted(sum(loop <= other for other in loops) for loop in loops)
        nested = depths[beside:]
        if (
            depths[:beside] != [1] * beside
            or nested[:alone] != [*range(1, alone + 1)]
            or not set(nested[alone:]) <= {*range(alone + 1, len(trips) + 1)}
        ):
            raise ValueError(
                f"expected {alone} to {len(trips)} loops, each within the one before, and {beside} "
                f"beside them; they are at depths {depths}"
            )
        counts: Counter[str] = Counter()
        for index in self.reachable() - skipped:
            weight = prod(trips[: sum(index in loop for loop in loops)])
            counts["instructions"] += weight
            if kind := self.instructions[index].kind:
                counts[kind] += weight
        return counts

    def count(self, *kinds: str) -> int:
        return sum(instruction.kind in kinds for instruction in self.instructions)


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. Spills are bytes stored plus loaded; local and shared are bytes held."""

    name: str
    arguments: tuple[str, ...]
    architecture: str
    registers: int
    spills: int
    local: int
    shared: int
    threads: int
    code: Code = field(repr=False)

    @property
    def occupancy(self) -> float:
        return occupancy(self.architecture, self.registers, self.threads, self.shared)


USED = re.compile(
    r"Compiling entry function '(?P<symbol>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
THREADS = re.compile(
    r"^\.nv\.info\.(\S+)\n(?:(?!^\.nv\.info).)*?EIATTR_MAX_THREADS\n[^\n]*\n\s*Value:\s*"
    r"0x([0-9a-f]+) 0x([0-9a-f]+) 0x([0-9a-f]+)",
    re.DOTALL | re.MULTILINE,
)


def parse_resources(log: str) -> dict[str, dict[str, int]]:
    """Read the registers and bytes of each kernel from the output of ``ptxas -v``."""
    found = {}
    for match in USED.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        local = re.search(r"(\d+) bytes lmem", match["rest"])
        found[match["symbol"]] = {
            "registers": int(match["registers"]),
            "spills": int(match["stores"]) + int(match["loads"]),
            "local": max(int(match["stack"]), int(local[1]) if local else 0),
            "shared": int(shared[1]) if shared else 0,
        }
    return found


def parse_threads(listing: str) -> dict[str, int]:
    """Read each kernel's threads of a block, by its launch bounds, from ``cuobjdump -elf``."""
    return {
        symbol: prod(int(size, 16) for size in sizes) for symbol, *sizes in THREADS.findall(listing)
    }


def parse_code(listing: str) -> dict[str, Code]:
    """Read the code of each kernel from ``nvdisasm -c``."""
    found: dict[str, Code] = {}
    code = Code()
    for line in listing.splitlines():
        if match := FUNCTION.match(line):
            code = found.setdefault(match[1], Code())
        elif match := LABEL.match(line):
            code.labels[match[1]] = len(code.instructions)
        elif match := INSTRUCTION.match(line):
            code.append(*match.groups())
    return found


def demangle(symbols: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Return the name of each kernel without its namespace, and its template arguments."""
    lines = run("c++filt", *symbols).splitlines()
    for symbol, line in zip(symbols, lines, strict=True):
        match = re.search(r"(\w+)<(.*?)>\(", line)
        if match is None:
            raise ValueError(f"given {symbol} ({line}), accepted are instances of templates")
        # How points are given is an argument of ours; the kernels for offsets are called fused.
        others = re.sub(r"[\w:]+::(Offsets|Locations)<[^<>]*>, ", "", match[2])
        fused = "fused_" if "::Offsets<" in match[2] else ""
        arguments = (argument.split("::")[-1] for argument in others.split(", "))
        # Unsigned numbers end in u.
        found = tuple(re.sub(r"^(\d+)u$", r"\1", argument) for argument in arguments)
        yield f"{fused}{match[1]}", found


def read_kernels(cubin: Path, log: str, architecture: str, tools: dict[str, Path]) -> list[Kernel]:
    """Read the kernels of a cubin; ``log`` is the output of ``ptxas -v`` for it."""
    resources = parse_resources(log)
    threads = parse_threads(run(tools["cuobjdump"], "-elf", cubin))
    codes = parse_code(run(tools["nvdisasm"], "-c", cubin))
    symbols = list(resources)
    if not symbols:
        raise RuntimeError(f"ptxas reports no kernel of {cubin.name}")
    return [
        Kernel(
            *name, architecture, **resources[symbol], threads=threads[symbol], code=codes[symbol]
        )
        for symbol, name in zip(symbols, demangle(symbols))
    ]


def run(*command: str | Path) -> str:
    """Run a program and return what it prints.

    Raises:
        LiteDetrError: it failed; the message has its first complaint.
    """
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["nothing printed"]
        errors = [line for line in lines if "error" in line] or lines
        raise LiteDetrError(f"{command[0]} failed: {errors[0]}")
    return result.stdout + result.stderr
