"""What a training that has left the finite numbers says of itself."""

from collections.abc import Mapping, Sequence


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
