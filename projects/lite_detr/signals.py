"""The signals by which schedulers ask a job to leave, on their way through its processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# What Slurm sends before it takes a job's machines away, and what users have it send by
# `sbatch --signal` some time before a job's end.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def passing_signals_on() -> Iterator[None]:
    """Pass the signals on to the processes that this one starts.

    Otherwise a signal to the starting process alone ends it, and the others with it, before they
    can save.
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
    """Make a data worker ignore the signals, except from the process that started it.

    Slurm sends them to all processes of a job, and a training run whose worker has died cannot
    finish its iteration. The loader itself ends its workers by SIGTERM.
    """
    parent = multiprocessing.parent_process().pid
    # Threads that are started later block them also.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
