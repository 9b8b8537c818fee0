"""The cases and records of a benchmark, and the tables and the chart made from them."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TASKS = ("inference", "training")
# In the order of a step. The latency does not include `data`, as loaders run beside the model.
# Everything that belongs to no other part is `other`.
DATA = "data"
PARTS = (
    DATA, "backbone", "neck", "encoder", "queries", "decoder", "losses", "matcher", "backward",
    "optimizer", "other",
)  # fmt: skip
LATENCY = "latency"
CASE_COLUMNS = ("subject", "task", "size", "batch", "dtype", "optimized", "compiled", "operators")


@dataclass(frozen=True)
class Case:
    """A case to measure.

    Attributes:
        subject: a config (a file or a name of the model zoo), or the name of a competitor.
        overrides: of the config's values, ``key=value``.
        task: one of ``TASKS``.
        size: of the images, (height, width) in pixels.
        batch: images at a time.
        dtype: ``float32``, or what ``torch.autocast`` computes in; the weights' if optimized.
        optimized: ``off``, ``on``, or one step of the optimization for inference.
        compiled: whether ``torch.compile`` compiles the parts.
        operators: ``native`` or ``pytorch``; a competitor has its own.
        device: ``cpu`` or ``cuda``.
        threads: of the CPU.
        clock: ``wall``, or ``process`` for the CPU time of the process, which counts that of all
            threads, and not what other processes take meanwhile.
    """

    subject: str
    overrides: tuple[str, ...]
    task: str
    size: tuple[int, int]
    batch: int
    dtype: str
    optimized: str
    compiled: bool
    operators: str
    device: str
    threads: int
    clock: str = "wall"

    @property
    def name(self) -> str:
        return ", ".join(self.text(column) for column in CASE_COLUMNS)

    def text(self, column: str) -> str:
        """Return a field as tables show it."""
        value = getattr(self, column)
        if column == "subject":
            return Path(value).stem
        if column == "size":
            return f"{value[0]}x{value[1]}"
        if column == "compiled":
            return "yes" if value else "no"
        return str(value)


@dataclass(frozen=True)
class Memory:
    """Memory in bytes.

    Attributes:
        held: between two passes: parameters, buffers and the optimizer's state.
        step: the peak of a pass or a step above that, including gradients.
        encoder: the peak of the encoder alone, in training with its backward pass.
    """

    held: int
    step: int
    encoder: int

    @property
    def peak(self) -> int:
        return self.held + self.step


@dataclass(frozen=True)
class Record:
    """The measurements of a case.

    Attributes:
        seconds: of each part, for each round; without parts that the case does not have.
        memory: None if it was not measured, or cannot be.
        multiply_adds: of one image; None if they were not counted.
        products: multiply-adds a second of a matrix product of the dtype, for each round.
    """

    case: Case
    seconds: Mapping[str, Sequence[float]]
    memory: Memory | None
    multiply_adds: float | None = None
    products: Sequence[float] = ()

    def rounds(self, name: str) -> np.ndarray:
        """Return ``[rounds]``, the milliseconds of a part; of all but the data for ``latency``."""
        if name != LATENCY:
            return 1e3 * np.asarray(self.seconds[name])
        return sum(self.rounds(part) for part in self.seconds if part != DATA)

    @property
    def images_per_second(self) -> float:
        return 1e3 * self.case.batch / float(np.median(self.rounds(LATENCY)))

    @property
    def rate(self) -> float | None:
        """Multiply-adds a second."""
        return self.multiply_adds and self.multiply_adds * self.images_per_second

    @property
    def share_of_product(self) -> float | None:
        """The rate as a share of a matrix product's."""
        return self.rate and self.rate / float(np.median(self.products))

    def as_json(self) -> dict[str, Any]:
        """Return everything: the case, the times with their summary, and the memory."""
        names = (LATENCY, *(part for part in PARTS if part in self.seconds))
        return {
            "case": dataclasses.asdict(self.case),
            "images_per_second": self.images_per_second,
            "milliseconds": {name: summary(self.rounds(name)) for name in names},
            "rounds_ms": {name: self.rounds(name).tolist() for name in names},
            "memory_bytes": self.memory
            and dataclasses.asdict(self.memory) | {"peak": self.memory.peak},
            "multiply_adds": self.multiply_adds,
            "multiply_adds_per_second": self.rate,
            "products_multiply_adds_per_second": list(self.products),
        }


def summary(samples: np.ndarray) -> dict[str, float]:
    """Return the median and the first and the last decile of some rounds."""
    p10, median, p90 = np.quantile(samples, (0.1, 0.5, 0.9)).tolist()
    return {"median": median, "p10": p10, "p90": p90}


def varying_columns(records: Sequence[Record]) -> list[str]:
    """Return ``subject``, and the other columns in which the records' cases differ."""
    return [
        column
        for column in CASE_COLUMNS
        if column == "subject" or len({record.case.text(column) for record in records}) > 1
    ]


def common_text(records: Sequence[Record]) -> str:
    """Return what all records have in common, as a line above their table."""
    case, varying = records[0].case, varying_columns(records)
    common = [f"{column} {case.text(column)}" for column in CASE_COLUMNS if column not in varying]
    rounds = len(records[0].seconds["other"])
    clock = f"{case.clock} clock"
    return ", ".join([*common, f"threads {case.threads}", clock, f"{rounds} rounds"])


def table(records: Sequence[Record]) -> str:
    """Return a markdown table: a row for each record, times in milliseconds, memory in MiB."""
    varying = varying_columns(records)
    parts = [part for part in PARTS if any(part in record.seconds for record in records)]
    has_memory = any(record.memory for record in records)
    header = [*varying, "latency", "p10", "p90", "images / s"]
    header += ["memory", "of it held", "encoder's memory"] if has_memory else []
    has_rate = any(record.products for record in records)
    header += ["G mult-adds / s", "of a product's"] if has_rate else []
    rows = []
    for record in records:
        latency = summary(record.rounds(LATENCY))
        row = [record.case.text(column) for column in varying]
        row += [digits(latency[name]) for name in ("median", "p10", "p90")]
        row.append(digits(record.images_per_second))
        if has_memory:
            row += _memory_cells(record.memory)
        if has_rate:
            row += _rate_cells(record)
        for part in parts:
            has_part = part in record.seconds
            row.append(digits(statistics.median(record.rounds(part))) if has_part else "–")
        rows.append(row)
    return _markdown(header + parts, rows, len(varying))


def comparison(first: Record, second: Record) -> str:
    """Return a markdown table of two cases' times and memory, part by part, with their ratios.

    The spread of a ratio is that of the rounds' ratios: what slows a round down slows both.
    """
    both = first.seconds.keys() & second.seconds.keys()
    names = [LATENCY, *(part for part in PARTS if part in both)]
    rows = []
    for name in names:
        times = first.rounds(name), second.rounds(name)
        ratio = summary(times[1] / times[0])
        rows.append([f"{name}, ms", *(digits(float(np.median(samples))) for samples in times)])
        rows[-1] += [f"{ratio[key]:.2f}" for key in ("median", "p10", "p90")]
    if first.memory and second.memory:
        fields = {"memory": "peak", "encoder's memory": "encoder"}
        for name, field in fields.items():
            sizes = [getattr(record.memory, field) for record in (first, second)]
            ratio = f"{sizes[1] / sizes[0]:.2f}" if sizes[0] else "–"
            rows.append([f"{name}, MiB", *map(_mebibytes, sizes), ratio, "–", "–"])
    labels = [record.case.text("subject") for record in (first, second)]
    header = ["", *labels, "ratio", "p10", "p90"]
    return _markdown(header, rows, 1)


def digits(value: float) -> str:
    """Format a positive number with about three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _mebibytes(size: int) -> str:
    return digits(size / 2**20)


def _memory_cells(memory: Memory | None) -> list[str]:
    if memory is None:
        return ["–"] * 3
    return [_mebibytes(size) for size in (memory.peak, memory.held, memory.encoder)]


def _rate_cells(record: Record) -> list[str]:
    if record.rate is None:
        return ["–"] * 2
    return [digits(record.rate / 1e9), f"{record.share_of_product:.2f}"]


def _markdown(header: list[str], rows: list[list[str]], texts: int) -> str:
    """Return a table whose first ``texts`` columns are text, the others numbers."""
    rule = "|---" * texts + "|---:" * (len(header) - texts) + "|"
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(r)} |" for r in rows)])


def draw(records: Sequence[Record], output: Path) -> None:
    """Draw a bar for each record: the parts of its latency, and beside it its memory if known."""
    from matplotlib.figure import Figure

    varying = varying_columns(records)
    labels = ["\n".join(record.case.text(column) for column in varying) for record in records]
    has_memory = any(record.memory for record in records)
    extent = (8 + 4 * has_memory, 2 + 0.3 * len(records) * len(varying))
    figure = Figure(figsize=extent, layout="constrained")
    axes = figure.subplots(
        1, 1 + has_memory, sharey=True, squeeze=False, width_ratios=(7, 4)[: 1 + has_memory]
    )
    _draw_times(axes[0, 0], records)
    if has_memory:
        _draw_memory(axes[0, 1], records)
    axes[0, 0].set_yticks(range(len(records)), labels)
    axes[0, 0].invert_yaxis()
    figure.legend(loc="outside lower center", ncols=5, fontsize="small")
    figure.suptitle(common_text(records), fontsize="small")
    figure.savefig(output, dpi=120)


def _draw_times(axis: "Axes", records: Sequence[Record]) -> None:
    rows = np.arange(len(records))
    left = np.zeros(len(records))
    for index, part in enumerate(part for part in PARTS if part != DATA):
        times = [float(np.median(r.rounds(part))) if part in r.seconds else 0.0 for r in records]
        if any(times):
            axis.barh(rows, times, left=left, color=f"C{index}", label=part)
            left += times
    spreads = [summary(record.rounds(LATENCY)) for record in records]
    # The parts' medians need not add up to the median of the whole, on which the whiskers stand.
    ends = np.array([[s["median"] - s["p10"], s["p90"] - s["median"]] for s in spreads]).T
    medians = [spread["median"] for spread in spreads]
    axis.errorbar(medians, rows, xerr=ends, fmt="|", color="black", capsize=3, label="p10 to p90")
    axis.set(xlabel="latency, ms", xlim=(0, None))


def _draw_memory(axis: "Axes", records: Sequence[Record]) -> None:
    rows = np.arange(len(records))
    held, step = (
        np.array([getattr(r.memory, field) / 2**20 if r.memory else 0.0 for r in records])
        for field in ("held", "step")
    )
    axis.barh(rows, held, color="0.75", label="held between steps")
    axis.barh(rows, step, left=held, color="0.4", label="a step's peak above it")
    axis.set(xlabel="memory, MiB", xlim=(0, None))
