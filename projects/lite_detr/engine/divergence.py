"""What a training that has left the finite numbers says of itself."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

LOOP = logging.getLogger("detectron2.engine.train_loop")


class DivergenceError(FloatingPointError):
    """A loss or a gradient is NaN or infinite; nothing has been learned from it.

    Args:
        what: is not finite.
        iteration: of the trainer.
        losses: by name, of a process that it happened in.
        files: of the images of that batch, in all processes that it happened in.

    Attributes:
        checkpoint: the last one, where to go on from; empty where there is none.
    """

    def __init__(
        self, what: str, iteration: int, losses: Mapping[str, float], files: Sequence[str]
    ):
        super().__init__(what, iteration, losses, files)
        self.what = what
        self.iteration = iteration
        self.losses = dict(losses)
        self.files = list(files)
        self.checkpoint = ""

    def fault(self) -> str:
        """What happened where, in three lines."""
        losses = ", ".join(f"{name} {loss:.4g}" for name, loss in self.losses.items())
        return (
            f"{self.what} at iteration {self.iteration}\n"
            f"  losses: {losses}\n"
            f"  images: {', '.join(self.files)}"
        )

    def __str__(self) -> str:
        return (
            f"{self.fault()}\n"
            f"  last checkpoint: {self.checkpoint or 'none'}\n"
            "Look at the images first; train.max_bad_batches=1 skips one such batch. If the losses "
            "rose before, lower optimizer.lr or optimizer.clip_norm. See docs/training.md"
        )


@contextmanager
def without_traceback() -> Iterator[None]:
    """Has Detectron2's loop log how a training diverged instead of where in the code."""

    def shorten(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, DivergenceError):
            record.msg, record.args, record.exc_info = error.fault(), (), None
        return True

    LOOP.addFilter(shorten)
    try:
        yield
    finally:
        LOOP.removeFilter(shorten)
