"""What is said of a fault in a dataset: its kind, what becomes of the data, and where it is."""

from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    """What a fault means for a run, worst first; docs/data_faults.md has the kinds of each."""

    REFUSED = "refused before training starts"
    LOST = "lost: skipped in training"
    CHANGED = "changed: used in another form"
    USED = "used, and good to know"


@dataclass(frozen=True)
class Fault:
    """All that is wrong in one way with one dataset.

    Attributes:
        kind: the name of docs/data_faults.md.
        outcome: what becomes of the data.
        message: a sentence that names the file and says what to do, or what is done.
        where: the ids of images, annotations or categories, or the names of files.
        reasons: for each file what is wrong with it; empty where it is the same for all.
    """

    kind: str
    outcome: Outcome
    message: str
    where: tuple[int | str, ...]
    reasons: tuple[str, ...] = ()


def some(items, limit: int = 10) -> str:
    """Joins the first items for a message."""
    text = ", ".join(str(item) for item in items[:limit])
    return text + ", ..." if len(items) > limit else text
