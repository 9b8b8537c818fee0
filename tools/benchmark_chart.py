"""The bar chart of a benchmark's records."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from benchmark_records import DATA, LATENCY, PARTS, Record, common_text, summary, varying_columns


def draw(records: Sequence[Record], output: Path) -> None:
    """A bar for each record: the parts of its latency, and beside it its memory if it is known."""
    varying = varying_columns(records)
    labels = ["\n".join(record.case.text(column) for column in varying) for record in records]
    has_memory = any(record.memory for record in records)
    figure, axes = plt.subplots(
        1, 1 + has_memory, figsize=(8 + 4 * has_memory, 2 + 0.3 * len(records) * len(varying)),
        layout="constrained", sharey=True, squeeze=False, width_ratios=(7, 4)[: 1 + has_memory],
    )  # fmt: skip
    _draw_times(axes[0, 0], records)
    if has_memory:
        _draw_memory(axes[0, 1], records)
    axes[0, 0].set_yticks(range(len(records)), labels)
    axes[0, 0].invert_yaxis()
    figure.legend(loc="outside lower center", ncols=5, fontsize="small")
    figure.suptitle(common_text(records), fontsize="small")
    figure.savefig(output, dpi=120)
    plt.close(figure)


def _draw_times(axis: plt.Axes, records: Sequence[Record]) -> None:
    rows = np.arange(len(records))
    left = np.zeros(len(records))
    for index, part in enumerate(part for part in PARTS if part != DATA):
        times = [float(np.median(r.rounds(part))) if part in r.seconds else 0.0 for r in records]
        if any(times):
            axis.barh(rows, times, left=left, color=plt.get_cmap("tab10")(index), label=part)
            left += times
    spreads = [summary(record.rounds(LATENCY)) for record in records]
    # The parts' medians need not add up to the median of the whole, which the whiskers are around.
    ends = np.array([[s["median"] - s["p10"], s["p90"] - s["median"]] for s in spreads]).T
    medians = [spread["median"] for spread in spreads]
    axis.errorbar(medians, rows, xerr=ends, fmt="|", color="black", capsize=3, label="p10 to p90")
    axis.set(xlabel="latency, ms", xlim=(0, None))


def _draw_memory(axis: plt.Axes, records: Sequence[Record]) -> None:
    rows = np.arange(len(records))
    held, step = (
        np.array([getattr(r.memory, field) / 2**20 if r.memory else 0.0 for r in records])
        for field in ("held", "step")
    )
    axis.barh(rows, held, color="0.75", label="held between steps")
    axis.barh(rows, step, left=held, color="0.4", label="a step's peak above it")
    axis.set(xlabel="memory, MiB", xlim=(0, None))
