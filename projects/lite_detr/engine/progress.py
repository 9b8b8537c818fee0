"""The terminal of a training run: few lines before it starts, and a progress bar while it runs."""

import logging
import math
import os
import sys

from detectron2.engine import HookBase
from detectron2.utils.logger import setup_logger
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

# The loggers that setup_logger gives handlers.
LOGGERS = ("fvcore", "detectron2", "lite_detr")
# Information that the terminal leaves to log.txt: loggers of Detectron2, and starts of messages.
LEFT_TO_FILES = {
    # The environment, the options and the config.
    "detectron2": ("",),
    "detectron2.data.build": ("Making batched data loader",),
    "detectron2.data.common": ("",),
    "detectron2.data.dataset_mapper": ("",),
    "detectron2.evaluation.coco_evaluation": (
        "Preparing results",
        "Evaluating predictions",
        "Fast COCO eval is not built",
    ),
}
# The lines of iterations, which a progress bar replaces.
ITERATIONS = "detectron2.utils.events"
# Losses that the bar's median is of.
WINDOW = 20
# Columns of a terminal that does not tell.
WIDTH = 80


def set_up_logging(output_dir: str, rank: int) -> None:
    """Log to ``log.txt``, and in the first process to the terminal what is of use there.

    Call this before Detectron2's ``default_setup``, which then finds its handlers in place.
    """
    # As default_setup calls it: Detectron2 caches the function by its arguments, and adds handlers
    # again for others.
    setup_logger(output_dir, distributed_rank=rank, name="fvcore")
    setup_logger(output_dir, distributed_rank=rank)
    setup_logger(output_dir, distributed_rank=rank, name="lite_detr")
    for handler in terminal_handlers():
        handler.addFilter(is_for_terminal)


def terminal_handlers() -> list[logging.StreamHandler]:
    """Return the handlers of the loggers that write to this process's standard streams."""
    return [
        handler
        for name in LOGGERS
        for handler in logging.getLogger(name).handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)
    ]


def is_for_terminal(record: logging.LogRecord) -> bool:
    starts = LEFT_TO_FILES.get(record.name, ())
    return record.levelno > logging.INFO or not record.getMessage().startswith(starts)


def is_not_an_iteration(record: logging.LogRecord) -> bool:
    return record.name != ITERATIONS


class Bar(tqdm):
    # No thread that redraws: data workers are forked, perhaps while it holds tqdm's lock.
    monitor_interval = 0


class ProgressBar(HookBase):
    """A bar with the time left at the foot of a terminal, above which all else is written.

    It is a context for the training, and a hook that comes last. Where neither stream is a terminal
    it does nothing. Otherwise log files have the lines of iterations, and the terminal has the bar.

    Args:
        start, total: the iterations that are done, and that will be at the end.
    """

    def __init__(self, start: int, total: int):
        self.start = start
        self.total = total
        self.bar: tqdm | None = None

    def __enter__(self) -> "ProgressBar":
        self._streams = {"stdout": sys.stdout, "stderr": sys.stderr}
        terminals = {name: file for name, file in self._streams.items() if file.isatty()}
        self._handlers = [
            (handler, handler.stream)
            for handler in terminal_handlers()
            if handler.stream in terminals.values()
        ]
        if not terminals:
            return self
        terminal = next(iter(terminals.values()))
        # Some, such as those of containers, do not know how wide they are.
        has_width = os.get_terminal_size(terminal.fileno()).columns > 0
        self.bar = Bar(
            desc="training",
            initial=self.start,
            total=self.total,
            file=terminal,
            ncols=None if has_width else WIDTH,
            dynamic_ncols=has_width,
            # The mean since the start, as evaluations are part of the time.
            smoothing=0,
        )
        above = DummyTqdmFile(terminal)
        for handler, _ in self._handlers:
            handler.setStream(above)
            handler.addFilter(is_not_an_iteration)
        # For what is printed, such as pycocotools' lines, and for warnings.
        for name in terminals:
            setattr(sys, name, above)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for name, stream in self._streams.items():
            setattr(sys, name, stream)
        for handler, stream in self._handlers:
            handler.setStream(stream)
            handler.removeFilter(is_not_an_iteration)
        if self.bar is not None:
            self.bar.close()

    def after_step(self) -> None:
        if self.bar is None:
            return
        storage = self.trainer.storage
        shown = {}
        losses = storage.histories().get("total_loss")
        if losses is not None:
            shown["loss"] = f"{losses.median(WINDOW):.4g}"
        for name, (value, _) in storage.latest().items():
            if name.endswith("/AP") and not math.isnan(value):
                shown[name] = f"{value:.1f}"
        self.bar.set_postfix(shown, refresh=False)
        # The last iteration of a start is finished by the next one.
        self.bar.update(self.trainer.iter + 1 - self.bar.n)
