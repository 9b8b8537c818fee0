"""Trainings in processes that are killed where a test says, cheaply: all fork from one server.

The server imports PyTorch and Detectron2 once. What runs in a child is ``train_net.py``'s ``main``.
"""

import argparse
import itertools
import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Callable

from programs import ROOT

CONFIG = ROOT / "tests" / "configs" / "resumable.py"

sys.path.append(str(ROOT))
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["train_net", "detectron2.model_zoo", "torch.utils.tensorboard", "lite_detr.data.evaluator"]
)


def train(*options: str, resume: bool = False, prepare: Callable[[], None] | None = None) -> int:
    """Trains in a process of its own and returns how it ended, as ``Process.exitcode`` says it.

    Args:
        options: of the config.
        resume: the training goes on.
        prepare: called in that process before the training; a function of a module.
    """
    process = CONTEXT.Process(target=run, args=(options, resume, prepare))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def run(options: list[str], resume: bool, prepare: Callable[[], None] | None) -> None:
    import train_net

    # Data workers are forked, as they are from a program.
    multiprocessing.set_start_method("fork", force=True)
    if prepare is not None:
        prepare()
    train_net.main(
        argparse.Namespace(
            config_file=str(CONFIG), resume=resume, eval_only=False, opts=list(options)
        )
    )


def signal_at(owner: str, name: str, nth: int, number: int = signal.SIGKILL) -> None:
    """Lets this process get a signal when something is called for the nth time, from 1 on.

    As from Slurm, its workers get it, too.

    Args:
        owner: a module or a class of a module, such as ``os`` or ``train_net:ResumePoint``.
        name: of the function.
    """
    module, *attributes = owner.split(":")
    holder = sys.modules[module]
    for attribute in attributes:
        holder = getattr(holder, attribute)
    function, calls = getattr(holder, name), itertools.count(1)

    def watched(*args, **kwargs):
        if next(calls) == nth:
            for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                # From another process, since the loader itself ends its workers by a signal.
                subprocess.run(["kill", f"-{int(number)}", str(process.pid)], check=True)
        return function(*args, **kwargs)

    setattr(holder, name, watched)
