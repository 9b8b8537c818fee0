"""Faults of a dataset: their kind, what becomes of the data, and where they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ..labels import printable


class Outcome(Enum):
    """The meaning of a fault for a run, worst first; docs/data_faults.md lists the kinds."""

    REFUSED = "refused before training starts"
    LOST = "lost: skipped in training"
    CHANGED = "changed: used in another form"
    USED = "used, and good to know"


@dataclass(frozen=True)
class Fault:
    """Everything that is wrong in one way with one dataset.

    Attributes:
        kind: its name in docs/data_faults.md.
        outcome: the meaning for a run.
        message: a sentence that names the file and says what to do, or what is done.
        where: the ids of images, annotations or categories, or the names of files.
        reasons: what is wrong with each file; empty if it is the same for all.
    """

    kind: str
    outcome: Outcome
    message: str
    where: tuple[int | str, ...]
    reasons: tuple[str, ...] = ()


def join_first(items: Sequence, limit: int = 10) -> str:
    """Join the first items for a message."""
    text = ", ".join(printable(item) for item in items[:limit])
    return text + ", ..." if len(items) > limit else text
