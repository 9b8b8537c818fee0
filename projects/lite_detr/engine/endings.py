"""How a training ends for what its user can mend: with one line, and without a traceback."""

import errno
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.utils import comm

from ..checkpoint.errors import SaveError, WeightsError
from ..data.coco_checks import DatasetError
from ..inference import OptimizationError
from ..model_zoo import ConfigError
from .divergence import DivergenceError
from .launch import LaunchError

LOOP = logging.getLogger("detectron2.engine.train_loop")

MENDABLE = (
    FileNotFoundError,
    ConfigError,
    DatasetError,
    DivergenceError,
    LaunchError,
    OptimizationError,
    SaveError,
    WeightsError,
)
# What the system says of a disk, a quota and a limit that are reached.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# So long a process leaves it to the first one to say what has happened to all.
PATIENCE = 20.0  # seconds


def explain(error: BaseException | None) -> str:
    """What to say of an error instead of a traceback; empty for one that only we can mend."""
    if isinstance(error, MENDABLE):
        return str(error)
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{error}: make room in train.output_dir, and go on with --resume"
    return ""


@contextmanager
def ending_in_one_line() -> Iterator[None]:
    """Ends the process with exit status 1, and a line on stderr, for a mendable error.

    When one process of a job ends, its launcher ends the others. So all but the first wait before
    they say anything, and what has happened to all is said once.
    """
    try:
        yield
    except Exception as error:
        message = explain(error)
        if not message:
            raise
        if not comm.is_main_process():
            time.sleep(PATIENCE)
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(1)


@contextmanager
def without_traceback() -> Iterator[None]:
    """Has Detectron2's loop log what such an error says instead of where in the code it was."""

    def shorten(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        message = error.fault() if isinstance(error, DivergenceError) else explain(error)
        if message:
            record.msg, record.args, record.exc_info = message, (), None
        return True

    LOOP.addFilter(shorten)
    try:
        yield
    finally:
        LOOP.removeFilter(shorten)
