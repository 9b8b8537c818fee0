"""Leaving when a scheduler asks for it: behind the present iteration, with a checkpoint."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, Self

from detectron2.utils import comm

# What Slurm sends before it takes a job's machines away, and what users have it send by
# `sbatch --signal` some time before a job's end.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# EX_TEMPFAIL of sysexits.h: not done, and to be started again with --resume.
EXIT_CODE = 75


class Preemption:
    """Notes the signals while it is entered as a context; :class:`ResumePoint` looks at it.

    It must be entered in the main thread, as Python wants it of all who handle signals.
    """

    def __init__(self):
        self.requested = False
        self._may_leave_at_once = False
        self._handlers = {}

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        # Of a data worker that got the signal while it started, or of a process that has left.
        if self.requested and isinstance(error, RuntimeError):
            leave()

    def agreed(self) -> bool:
        """Whether any process of the job was asked to leave; all of them have to call this."""
        return any(comm.all_gather(self.requested))

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """For what takes long, such as an evaluation, behind a checkpoint: nothing is lost."""
        if self.requested:
            leave()
        self._may_leave_at_once = True
        try:
            yield
        finally:
            self._may_leave_at_once = False

    def _note(self, number: int, frame) -> None:
        # Not logged here: the signal may have come in the middle of a write to the log.
        self.requested = True
        if self._may_leave_at_once:
            leave()


def leave() -> NoReturn:
    raise SystemExit(EXIT_CODE)


@contextmanager
def passing_signals_on() -> Iterator[None]:
    """Passes the signals on to the processes that this one starts.

    Otherwise one that is sent to the starting process alone ends it, and the others with it before
    they can save.
    """

    def pass_on(number: int, frame) -> None:
        children = multiprocessing.active_children()
        if not children:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        for child in children:
            os.kill(child.pid, number)

    handlers = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def outlive_signals() -> None:
    """Lets a data worker ignore the signals, but for those of the process that started it.

    Slurm sends them to all processes of a job, and a training whose worker has died cannot finish
    its iteration. The loader itself ends its workers by SIGTERM.
    """
    parent = multiprocessing.parent_process().pid
    # Threads that are started later block them, too.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
