"""Detectron2's trainer on any device and in any precision, with several batches per step."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch
from detectron2.engine import AMPTrainer, HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigError, DivergenceError, WeightsError, user_message
from ..modeling.criterion import count_objects

logger = logging.getLogger("lite_detr")
# Detectron2's loop logs the error that ends it here.
loop_logger = logging.getLogger("detectron2.engine.train_loop")

PRECISIONS = ("float32", "bfloat16", "float16")
# Float16's smallest normal number: a loss scaled down so far has no gradient to lose.
SMALLEST_SCALE = 2.0**-14


class Stopped(BaseException):
    """Leaves Detectron2's loop, which would log an ``Exception`` as a failure."""


class Trainer(AMPTrainer):
    """Detectron2's trainer, whose iteration is one step of the optimizer.

    Args:
        model: a detector, or its DDP wrapper.
        data_loader: yields batches, which are lists of Detectron2's dicts.
        optimizer: updates the model's parameters; it clips their gradients itself.
        precision: ``float32``, or the precision of ``torch.autocast``: ``bfloat16``, or ``float16``
            with scaled losses. Weights and gradients are always float32.
        accumulation: the number of batches per iteration; their gradients are those of one large
            batch.
        max_bad_batches: the number of iterations whose loss or gradient may be NaN or infinite;
            they change no weight and are counted as ``bad_batches``, and training goes on.

    Attributes:
        hooks: the registered hooks, in their order.
        stopped: whether :meth:`stop` was called.

    Raises:
        ConfigError: an option is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict]],
        optimizer: torch.optim.Optimizer,
        *,
        precision: str = "float32",
        accumulation: int = 1,
        max_bad_batches: int = 0,
    ):
        if precision not in PRECISIONS:
            raise ConfigError(
                f"train.amp.precision is {precision!r}; accepted are {', '.join(PRECISIONS)}"
            )
        if accumulation < 1 or max_bad_batches < 0:
            raise ConfigError(
                "train.accumulation must be at least 1 and train.max_bad_batches at least 0, got "
                f"{accumulation} and {max_bad_batches}"
            )
        self.hooks: list[HookBase] = []
        self.stopped = False
        self.device = next(model.parameters()).device
        super().__init__(
            model,
            data_loader,
            optimizer,
            grad_scaler=torch.amp.GradScaler(self.device.type, enabled=precision == "float16"),
            precision=getattr(torch, precision),
        )
        self.accumulation = accumulation
        self.max_bad_batches = max_bad_batches
        self.bad_batches = 0

    def register_hooks(self, hooks: Sequence[HookBase | None]) -> None:
        """See Detectron2's ``TrainerBase.register_hooks``."""
        super().register_hooks(hooks)
        self.hooks += filter(None, hooks)

    def train(self, start_iter: int, max_iter: int) -> None:
        """See Detectron2's ``TrainerBase.train``.

        Raises:
            DivergenceError: more losses or gradients than ``max_bad_batches`` were not finite;
                raised in all processes.
        """
        with without_traceback(), suppress(Stopped):
            super().train(start_iter, max_iter)

    def stop(self) -> None:
        """End training after this iteration, although it is not the last; for hooks.

        All processes must call this in the same iteration. Its other hooks still run, and then
        ``after_train`` of all hooks, in which ``iter`` is the iteration and ``stopped`` is set.
        """
        self.stopped = True

    def before_train(self) -> None:
        super().before_train()
        # A run that goes on finishes the iteration that was saved, which may be where it stops.
        self._end_if_stopped()

    def after_step(self) -> None:
        super().after_step()
        self._end_if_stopped()

    def _end_if_stopped(self) -> None:
        if self.stopped:
            raise Stopped

    def after_train(self) -> None:
        """See Detectron2's ``TrainerBase.after_train``, which is called after an error also."""
        error = sys.exc_info()[1]
        try:
            super().after_train()
        # Hooks may rely on iterations that there were none of, and must not hide the first error.
        except Exception:
            if error is None or isinstance(error, Stopped):
                raise
            logger.debug("after an error in training, a hook failed as well", exc_info=True)

    def run_step(self) -> None:
        if not self.model.training:
            raise RuntimeError(
                f"the {type(self.model).__name__} that is trained is in evaluation mode at "
                f"iteration {self.iter}, and so computes no losses: a hook that calls model.eval() "
                "must call model.train() afterwards"
            )
        # The iterator and the records are those of Detectron2's own run_step.
        start = time.perf_counter()
        batches = [next(self._data_loader_iter) for _ in range(self.accumulation)]
        data_time = time.perf_counter() - start
        try:
            losses = self.accumulate(batches)
            self.after_backward()
            self._write_metrics(losses, data_time)
            self.update(losses, batches)
        except DivergenceError as error:
            self.bad_batches += 1
            if self.bad_batches > self.max_bad_batches:
                raise
            self.storage.put_scalar("bad_batches", self.bad_batches)
            logger.warning(
                "%s\nThis iteration is skipped, the bad batch %d of the %d that "
                "train.max_bad_batches allows",
                error.summary(),
                self.bad_batches,
                self.max_bad_batches,
            )

    def accumulate(self, batches: Sequence[list[dict]]) -> dict[str, Tensor]:
        """Add up the gradients of all batches.

        Returns:
            The losses by name, summed over batches and averaged over processes, on the CPU.

        Raises:
            DivergenceError: a loss is not finite in some process.
        """
        self.optimizer.zero_grad()
        options = {}
        if len(batches) > 1:
            inputs = [inputs for batch in batches for inputs in batch]
            options["num_objects"] = count_objects(inputs, self.device)
        totals: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            with self.synchronised(index == len(batches) - 1):
                losses = self.losses(batch, **options)
                for name, loss in self.finite_on_host(losses, batch).items():
                    totals[name] = totals.get(name, 0.0) + loss
                self.grad_scaler.scale(sum(losses.values())).backward()
        return totals

    def synchronised(self, last: bool) -> AbstractContextManager:
        """Return the context for a batch: DDP sums gradients over processes in the last only."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def losses(self, batch: list[dict], **options: Tensor) -> dict[str, Tensor]:
        enabled = self.precision != torch.float32
        with torch.autocast(self.device.type, self.precision, enabled=enabled):
            return self.model(batch, **options)

    def finite_on_host(self, losses: dict[str, Tensor], batch: list[dict]) -> dict[str, Tensor]:
        """Return the losses averaged over processes, with one copy from the device.

        This comes before the backward pass, in which processes wait for each other.

        Raises:
            DivergenceError: one of them is not finite in some process.
        """
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        means = values / comm.get_world_size()
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(means)
        means = means.cpu()
        if not means.isfinite().all():
            own = dict(zip(losses, values.tolist()))
            raise self.divergence("the loss is not finite", own, batch, not values.isfinite().all())
        return dict(zip(losses, means))

    def update(self, losses: dict[str, Tensor], batches: Sequence[list[dict]]) -> None:
        """Do a step of the optimizer; in float16, none if the scaled gradient has overflowed.

        Raises:
            DivergenceError: the gradient is not finite.
        """
        what = ""
        try:
            self.grad_scaler.step(self.optimizer)
        except FloatingPointError as error:
            what = str(error)
        self.grad_scaler.update()
        if self.grad_scaler.is_enabled():
            scale = self.grad_scaler.get_scale()
            self.storage.put_scalar("grad_scale", scale)
            if scale < SMALLEST_SCALE:
                what = "the gradient is not finite, however small the loss is scaled,"
        if what:
            inputs = [inputs for batch in batches for inputs in batch]
            own = {name: loss.item() for name, loss in losses.items()}
            raise self.divergence(what, own, inputs, True)

    def divergence(
        self, what: str, losses: dict[str, float], batch: list[dict], concerned: bool
    ) -> DivergenceError:
        """Return the error for all processes; each says whether it happened in its batch."""
        files = [inputs.get("file_name", "an image without a file name") for inputs in batch]
        reports = comm.all_gather((losses, files) if concerned else None)
        reports = [report for report in reports if report is not None]
        files = [name for _, names in reports for name in names]
        return DivergenceError(what, self.iter, reports[0][0], files)

    def state_dict(self) -> dict:
        return super().state_dict() | {
            "bad_batches": self.bad_batches,
            "optimizer_class": type(self.optimizer).__name__,
            "parameter_groups": self.parameter_groups(),
        }

    def parameter_groups(self) -> list[list[str]]:
        """Return the names of the parameters in each of the optimizer's groups."""
        model = getattr(self.model, "module", self.model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = self.optimizer.param_groups
        return [[names.get(id(p), "") for p in group["params"]] for group in groups]

    def load_state_dict(self, state_dict: dict) -> None:
        """See Detectron2's ``TrainerBase.load_state_dict``.

        Raises:
            WeightsError: the state is of another optimizer, or of other parameters.
        """
        self._check_optimizer(state_dict)
        # The state of a run in another precision, or of another trainer.
        if not state_dict.get("grad_scaler"):
            state_dict = state_dict | {"grad_scaler": self.grad_scaler.state_dict()}
        super().load_state_dict(state_dict)
        self.bad_batches = state_dict.get("bad_batches", 0)

    def _check_optimizer(self, state: dict) -> None:
        """Compare what PyTorch would load without a word, or refuse with a traceback."""
        theirs, ours = state["optimizer"]["param_groups"], self.parameter_groups()
        names = state.get("parameter_groups")
        if names is not None and names != ours:
            old, new = ({name for group in groups for name in group} for groups in (names, ours))
            frozen, freed = sorted(old - new), sorted(new - old)
            parts = []
            if frozen:
                parts.append(f"{len(frozen)} of its parameters, such as {frozen[0]}, are frozen")
            if freed:
                parts.append(f"{len(freed)}, such as {freed[0]}, were frozen in it")
            parts = parts or ["its parameters are grouped in another way"]
        elif [len(group["params"]) for group in theirs] != [len(group) for group in ours]:
            parts = [
                f"its optimizer has {len(theirs)} groups of parameters, and this one {len(ours)} "
                "groups, or groups of other sizes"
            ]
        elif state.get("optimizer_class", "") not in ("", type(self.optimizer).__name__):
            parts = [
                f"its optimizer is {state['optimizer_class']}, and this one "
                f"{type(self.optimizer).__name__}"
            ]
        else:
            return
        raise WeightsError(
            f"the checkpoint cannot be resumed with these options: {' and '.join(parts)}. Give the "
            "options that it was trained with, or start a new run from its weights: "
            "train.init_checkpoint=FILE and another train.output_dir, without --resume"
        )


@contextmanager
def without_traceback() -> Iterator[None]:
    """Make Detectron2's loop log one line, not a traceback, for an error that a user can mend."""

    def shorten(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        is_divergence = isinstance(error, DivergenceError)
        message = error.summary() if is_divergence else user_message(error)
        if message:
            record.msg, record.args, record.exc_info = message, (), None
        return True

    loop_logger.addFilter(shorten)
    try:
        yield
    finally:
        loop_logger.removeFilter(shorten)
