"""Draw the losses and the average precision of a training run."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..errors import MissingFileError
from ..labels import matplotlib_label
from .resume import read_records

# The last decoder layer's losses; those of the other layers follow the same course.
LOSSES = {"total_loss": "all", "loss_ce": "class", "loss_bbox": "box L1", "loss_giou": "box GIoU"}
# With several test sets, each has its own behind its name, such as a_val/bbox/AP.
PRECISIONS = {"bbox/AP": "AP", "bbox/AP50": "AP50", "bbox/AP75": "AP75"}


def find_series(
    records: Sequence[dict], names: dict[str, str]
) -> dict[str, list[tuple[int, float]]]:
    """Return ``{label: [(iteration, value), ...]}`` for the keys that the records have."""
    keys = dict(names)
    for record in records:
        for key in record:
            test_set, _, task = key.partition("/")
            if task in names:
                keys[key] = matplotlib_label(f"{names[task]}, {test_set}", limit=100)
    series = {
        label: [
            (record["iteration"], record[key])
            for record in records
            if isinstance(record.get(key), (int, float))
        ]
        for key, label in keys.items()
    }
    return {label: points for label, points in series.items() if points}


def plot(metrics_file: Path, output: Path) -> None:
    """Draw the records of a ``metrics.json`` as a picture.

    Raises:
        MissingFileError: the file does not exist, or has no records.
    """
    if not metrics_file.is_file():
        raise MissingFileError(
            f"{metrics_file} is not a file; Detectron2 writes it to train.output_dir"
        )
    records = list(read_records(metrics_file.read_bytes()))
    if not records:
        raise MissingFileError(f"{metrics_file} has no records of a training run")
    panels = [("loss", LOSSES, True), ("average precision on the test set, %", PRECISIONS, False)]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, (label, names, logarithmic) in zip(axes, panels):
        for name, points in find_series(records, names).items():
            marker = "" if logarithmic else "o"
            axis.plot(*zip(*points), marker=marker, label=name)
        axis.set(xlabel="iteration", ylabel=label)
        if logarithmic:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3, which="both")
        if axis.lines:
            axis.legend()
    figure.savefig(output, dpi=120)
    plt.close(figure)
