"""Where a training run is saved, and how it goes on from there: its state and its records."""

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detectron2.checkpoint import PeriodicCheckpointer
from detectron2.engine import HookBase, default_writers
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    EventWriter,
    TensorboardXWriter,
    get_event_storage,
)
from fvcore.common.history_buffer import HistoryBuffer

from ..checkpoint import DetrCheckpointer
from ..errors import SaveError, raised_in_all
from ..random_states import get_random_states, set_random_states
from .preemption import Preemption, leave

logger = logging.getLogger("lite_detr")

# The checkpoint of an iteration that has no periodic one; the next such one replaces it.
LAST = "model_last"
# Iterations that Detectron2's writers take medians over.
WINDOW = 20


class Records:
    """Detectron2's records of a run, ``metrics.json`` and TensorBoard's, across its starts.

    A run that goes on from a checkpoint writes the later records again. So that none is in the
    files twice, the older ones are removed: ``metrics.json`` is cut, and the rest is kept in
    ``metrics.removed.json``; TensorBoard is told to hide them.

    Args:
        folder: where the main process writes. Only files in local folders are cut.
        max_iter: the last iteration, for the printed estimate of the remaining time.
    """

    def __init__(self, folder: str | os.PathLike, max_iter: int):
        self.folder = os.fspath(folder)
        self.max_iter = max_iter
        self.file = Path(folder, "metrics.json")

    def state_dict(self, storage: EventStorage) -> dict[str, Any]:
        """Return the size of ``metrics.json`` in bytes, and the scalars of the medians."""
        hints, scalars = storage.smoothing_hints(), {}
        for name, history in storage.histories().items():
            # Detectron2's timer omits the first iterations of a start; the time of an older start
            # would be written as if it were new.
            if name == "time":
                continue
            samples = history.values()[-storage.count_samples(name, WINDOW) :]
            scalars[name] = {"smoothed": hints[name], "samples": samples}
        return {"size": self.file.stat().st_size if self.file.exists() else 0, "scalars": scalars}

    def restore(self, state: dict[str, Any], storage: EventStorage) -> None:
        """Put the scalars of :meth:`state_dict` into a new storage.

        Writers write each scalar that was put into the storage once; so what is in the records
        already only goes into the history.
        """
        written = last_iteration(self.file, state["size"])
        for name, scalar in state["scalars"].items():
            history = storage.histories().setdefault(name, HistoryBuffer())
            storage.smoothing_hints()[name] = scalar["smoothed"]
            for value, iteration in scalar["samples"]:
                if iteration <= written:
                    history.update(value, iteration)
                else:
                    storage.put_scalar(
                        name, value, smoothing_hint=scalar["smoothed"], cur_iter=iteration
                    )

    def writers(self) -> list[EventWriter]:
        """Return Detectron2's default writers, which append to existing files."""
        _, *writers = default_writers(self.folder, self.max_iter)
        return [Printer(self.max_iter), *writers]

    def writers_from(self, iteration: int, size: int) -> list[EventWriter]:
        """Return the writers of a run that goes on.

        Args:
            iteration: the first iteration to be recorded.
            size: the size of ``metrics.json`` up to there, in bytes.
        """
        if "://" in self.folder:
            return self.writers()
        self._cut(size)
        printer, writer, _ = self.writers()
        return [printer, writer, TensorboardXWriter(self.folder, purge_step=iteration)]

    def _cut(self, size: int) -> None:
        """Keep the first bytes of ``metrics.json``, up to the end of a line."""
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
            "%s: moved %d records of iterations that are trained again to %s",
            self.file,
            content.count(b"\n", kept),
            removed.name,
        )


class Printer(CommonMetricPrinter):
    """Prints each iteration once; Detectron2's divides by the iterations since the last line."""

    printed = -1

    def write(self) -> None:
        iteration = get_event_storage().iter
        if iteration != self.printed:
            super().write()
            self.printed = iteration


def last_iteration(file: Path, size: int) -> int:
    """Return the last iteration in the first bytes of a ``metrics.json``; -1 if there is none."""
    records = read_records(file.read_bytes()[:size]) if file.exists() else ()
    return max((record["iteration"] for record in records), default=-1)


def read_records(content: bytes) -> Iterator[dict[str, Any]]:
    """Yield the records of a ``metrics.json``, one a line, without lines that are damaged."""
    for line in content.splitlines():
        try:
            record = json.loads(line)
        # A line may also be nested too deeply.
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("iteration"), int):
            yield record


class ResumePoint(HookBase):
    """Saves all that the course of a training run depends on, and goes on from there.

    It does what Detectron2's ``PeriodicCheckpointer`` does, but in all processes, as each has its
    own random generators and data stream. It also saves

    * when a scheduler asks the job to leave, and leaves;
    * before an evaluation, so that a kill during the evaluation loses no training.

    Training goes on inside the iteration that was saved: hooks after this one, such as evaluation
    and writers, first finish that iteration. They must leave the model and the random generators
    as they were. The trainer must be ours, which lists its hooks.

    Args:
        checkpointer: saves, with the trainer among its checkpointables.
        loader: the training loader. If :func:`build_train_loader` did not make it, it starts over.
        records: the records of the run.
        preemption: tells when to leave.
        eval_period: the period of ``EvalHook``; 0 means the end of training only.
        **periodic: see ``PeriodicCheckpointer``: ``period``, ``max_to_keep``.
    """

    def __init__(
        self,
        checkpointer: DetrCheckpointer,
        loader: Any,
        records: Records,
        preemption: Preemption,
        eval_period: int,
        **periodic: Any,
    ):
        self.checkpointer = checkpointer
        self.loader = loader
        self.records = records
        self.preemption = preemption
        self.eval_period = eval_period
        self.periodic = PeriodicCheckpointer(checkpointer, **periodic)
        # The state of all processes, as it was last gathered or loaded.
        self._state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that Detectron2's trainer keeps for this hook."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state

    def writers(self, resume: bool) -> list[EventWriter]:
        """Return the writers for the main process, after the checkpoint has been loaded.

        Args:
            resume: whether the run shall go on; if there is nothing to resume, from its beginning.
        """
        if resume and not self.checkpointer.resumed:
            return self.records.writers_from(0, size=0)
        saved = self.trainer.iter
        if resume and self._is_of(saved):
            return self.records.writers_from(saved, self._state["records"]["size"])
        return self.records.writers()

    def before_train(self) -> None:
        self.periodic.max_iter = self.trainer.max_iter
        if not self.checkpointer.resumed:
            return
        saved = self.trainer.start_iter - 1
        self.periodic.recent_checkpoints = self._periodic_checkpoints(saved)
        if not self._is_of(saved):
            logger.warning(
                "the checkpoint does not say where the data stream and the random generators were: "
                "both start over, and training takes another course than without interruption"
            )
            return
        self._restore()
        # If no iteration is left, the trainer counts from here to the end of training.
        self.trainer.iter = self.trainer.storage.iter = saved
        if saved + 1 >= self.trainer.max_iter:
            # The kill may have come between the last periodic checkpoint and the final one.
            self._save(f"{self.periodic.file_prefix}_final")
        hooks = self.trainer.hooks
        for hook in hooks[hooks.index(self) + 1 :]:
            hook.after_step()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        leaving = self.preemption.agreed()
        periodic = done % self.periodic.period == 0 or done == self.trainer.max_iter
        evaluated = self.eval_period > 0 and done % self.eval_period == 0
        if periodic or evaluated or leaving:
            self._save("" if periodic else LAST)
        if leaving:
            # The first process to leave brings the others down, so not before the file is written.
            comm.synchronize()
            logger.warning("asked to leave: iteration %d is saved; --resume goes on", done - 1)
            leave()

    def after_train(self) -> None:
        if self.trainer.stopped:
            # As it was saved before the evaluation: a run that is resumed here evaluates again,
            # and stops again, or goes on.
            with raised_in_all(SaveError):
                if comm.is_main_process():
                    name = f"{self.periodic.file_prefix}_final"
                    self.checkpointer.save(name, iteration=self.trainer.iter)

    def _is_of(self, iteration: int) -> bool:
        """Tell whether the state is of an iteration; another hook may have saved an older one."""
        return self._state.get("iteration") == iteration

    def _save(self, name: str) -> None:
        """Save the current iteration under a name; without one, as periodic checkpoints are.

        All processes must call this.

        Raises:
            SaveError: the checkpoint cannot be written; raised in all processes.
        """
        stream = self.loader.state_dict() if self._has_stream else None
        ranks = comm.gather({"random": get_random_states(), "stream": stream})
        with raised_in_all(SaveError):
            if comm.is_main_process():
                self._write(name, ranks)

    def _write(self, name: str, ranks: list[dict[str, Any]]) -> None:
        self._state = {
            "iteration": self.trainer.iter,
            "ranks": ranks,
            "records": self.records.state_dict(self.trainer.storage),
        }
        if name:
            self.checkpointer.save(name, iteration=self.trainer.iter)
        else:
            self.periodic.step(self.trainer.iter)

    def _restore(self) -> None:
        ranks = self._state["ranks"]
        streams = [rank["stream"] for rank in ranks]
        if self._has_stream and None not in streams:
            self.loader.load_states(streams)
        else:
            logger.warning(
                "the data stream starts over, as dataloader.train is or was not that of "
                "lite_detr.data.train_loader.build_train_loader"
            )
        if len(ranks) == comm.get_world_size():
            set_random_states(ranks[comm.get_rank()]["random"])
        if comm.is_main_process():
            self.records.restore(self._state["records"], self.trainer.storage)

    @property
    def _has_stream(self) -> bool:
        return hasattr(self.loader, "load_states")

    def _periodic_checkpoints(self, last: int) -> list[str]:
        """Return those up to an iteration, oldest first, so that ``max_to_keep`` counts them."""
        found = {}
        for path in self.checkpointer.get_all_checkpoint_files():
            match = re.search(rf"/{self.periodic.file_prefix}_(\d+)\.pth$", path)
            if match and int(match[1]) <= last:
                found[int(match[1])] = path
        return [found[iteration] for iteration in sorted(found)]
