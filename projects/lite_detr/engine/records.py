"""Detectron2's records of a training, ``metrics.json`` and TensorBoard's, across new starts."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from detectron2.engine import default_writers
from detectron2.utils.events import EventStorage, EventWriter, TensorboardXWriter

logger = logging.getLogger("lite_detr")

# Iterations that Detectron2's writers take medians over.
WINDOW = 20


class Records:
    """What is recorded of a training in a folder.

    A training that goes on from a checkpoint writes the records behind it anew. Those that were
    written there before would be twice in the files, so they are taken out: ``metrics.json`` is
    cut, and what is cut off is kept in ``metrics.removed.json``; TensorBoard is told to hide them.

    Args:
        folder: where the main process writes. Files in other than local ones are not cut.
        max_iter: of the training, for the printed estimate of the time that is left.
    """

    def __init__(self, folder: str | os.PathLike, max_iter: int):
        self.folder = os.fspath(folder)
        self.max_iter = max_iter
        self.file = Path(folder, "metrics.json")

    def state_dict(self, storage: EventStorage) -> dict[str, Any]:
        """The size of ``metrics.json`` in bytes, and the scalars that medians are taken over."""
        hints, scalars = storage.smoothing_hints(), {}
        for name, history in storage.histories().items():
            # Detectron2's timer leaves out the first iterations of a start, in which an older one's
            # time would be written as if it were new.
            if name == "time":
                continue
            samples = history.values()[-storage.count_samples(name, WINDOW) :]
            scalars[name] = {"smoothed": hints[name], "samples": samples}
        return {"size": self.file.stat().st_size if self.file.exists() else 0, "scalars": scalars}

    def restore(self, state: dict[str, Any], storage: EventStorage) -> None:
        """Puts the scalars of :meth:`state_dict` into a new storage."""
        for name, scalar in state["scalars"].items():
            for value, iteration in scalar["samples"]:
                storage.put_scalar(
                    name, value, smoothing_hint=scalar["smoothed"], cur_iter=iteration
                )

    def writers(self) -> list[EventWriter]:
        """Detectron2's default writers, which add to what is there."""
        return default_writers(self.folder, self.max_iter)

    def writers_from(self, iteration: int, size: int) -> list[EventWriter]:
        """The writers of a training that goes on.

        Args:
            iteration: the first whose records are to be written.
            size: of ``metrics.json`` without them, in bytes.
        """
        if "://" in self.folder:
            return self.writers()
        self._cut(size)
        printer, writer, _ = self.writers()
        events = TensorboardXWriter(self.folder, purge_step=iteration)
        # They write each scalar that is newer than this, so none that they have written.
        writer._last_write = events._last_write = last_iteration(self.file)
        return [printer, writer, events]

    def _cut(self, size: int) -> None:
        """Leaves the first bytes of ``metrics.json``, up to the end of a line."""
        content = self.file.read_bytes() if self.file.exists() else b""
        kept = content.rfind(b"\n", 0, size) + 1
        if kept == len(content):
            return
        removed = self.file.with_name("metrics.removed.json")
        with open(removed, "ab") as file:
            file.write(content[kept:])
            file.flush()
            os.fsync(file.fileno())
        os.truncate(self.file, kept)
        logger.info(
            "%s: moved %d records of iterations that are trained anew to %s",
            self.file,
            content.count(b"\n", kept),
            removed.name,
        )


def last_iteration(file: Path) -> int:
    """The last iteration that records in a file are of; -1 if it has none."""
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["iteration"] for line in lines), default=-1)
