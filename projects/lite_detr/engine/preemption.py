"""Leave when a scheduler asks for it: after the current iteration, with a checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from detectron2.utils import comm

from ..signals import SIGNALS

# EX_TEMPFAIL of sysexits.h: not done, start again with --resume.
EXIT_CODE = 75


class Preemption:
    """Notes the signals while it is entered as a context; :class:`ResumePoint` looks at it.

    It must be entered in the main thread, the only one in which Python handles signals.
    """

    def __init__(self):
        self.requested = False
        self._may_leave_at_once = False
        self._handlers = {}

    def __enter__(self) -> "Preemption":
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        # Of a data worker that got the signal while it started, or of a process that has left.
        if self.requested and isinstance(error, RuntimeError):
            leave()

    def agreed(self) -> bool:
        """Tell whether any process of the job was asked to leave; all of them must call this."""
        return any(comm.all_gather(self.requested))

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """Leave without delay in here: long work after a checkpoint, such as an evaluation."""
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
