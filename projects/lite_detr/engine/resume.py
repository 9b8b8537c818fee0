"""The point of an iteration at which a training is saved, and from which it goes on."""

import logging
import re
from typing import Any

from detectron2.checkpoint import PeriodicCheckpointer
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from ..checkpoint import DetrCheckpointer, SaveError
from ..errors import raised_in_all
from ..random_states import get_random_states, set_random_states
from .preemption import Preemption, leave
from .records import Records

logger = logging.getLogger("lite_detr")

# The checkpoint of an iteration that has no periodic one; the next such one takes its place.
LAST = "model_last"


class ResumePoint(HookBase):
    """Saves checkpoints that hold all that a training's course depends on, and goes on from them.

    It does what Detectron2's ``PeriodicCheckpointer`` does, but in all processes, as each has
    random generators and a data stream of its own. Besides, it saves

    * when a scheduler asks the training to leave, and leaves;
    * before an evaluation, so that a kill in it loses no training.

    A training goes on inside the iteration that was saved: hooks that stand behind this one, such
    as evaluation and writers, first finish that iteration. They have to leave the model and the
    random generators as they were.

    Args:
        checkpointer: where to save, with the trainer among its checkpointables.
        loader: the training's. One that is not made by :func:`build_train_loader` starts anew.
        records: what is written of the training.
        preemption: whether to leave.
        eval_period: that of ``EvalHook``: 0 is for the end of training only.
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
        # Of all processes, as it was last gathered, or is to be restored.
        self._state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Detectron2's trainer keeps it among the states of its hooks."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state

    def writers(self, resume: bool) -> list[EventWriter]:
        """The writers for the main process, when the checkpoint has been loaded.

        Args:
            resume: the training is to go on; if nothing is there to resume, from its beginning.
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
                "both start anew, and the training takes another course than without interruption"
            )
            return
        self._restore()
        # Where no iteration is left, the trainer counts on from here to the end of training.
        self.trainer.iter = self.trainer.storage.iter = saved
        if saved + 1 >= self.trainer.max_iter:
            # The kill may have come between the last periodic checkpoint and the final one.
            self._save(f"{self.periodic.file_prefix}_final")
        hooks = self.trainer._hooks
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
            # Whoever leaves first brings the others down, so not before the file is written.
            comm.synchronize()
            logger.warning("asked to leave: iteration %d is saved; --resume goes on", done - 1)
            leave()

    def _is_of(self, iteration: int) -> bool:
        """Whether the state is of an iteration: what another hook saved may hold an older one."""
        return self._state.get("iteration") == iteration

    def _save(self, name: str) -> None:
        """Saves the present iteration under a name; without one, as periodic checkpoints are.

        All processes have to call this.

        Raises:
            SaveError: the checkpoint cannot be written; all processes raise it alike.
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
                "the data stream starts anew, as dataloader.train is or was not that of "
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
        """Those up to an iteration, oldest first, so that ``max_to_keep`` counts them, too."""
        found = {}
        for path in self.checkpointer.get_all_checkpoint_files():
            match = re.search(rf"/{self.periodic.file_prefix}_(\d+)\.pth$", path)
            if match and int(match[1]) <= last:
                found[int(match[1])] = path
        return [found[iteration] for iteration in sorted(found)]
