"""The output of a run, on a terminal and without one."""

import contextlib
import fcntl
import logging
import os
import struct
import sys
import termios
import threading

import pytest
from detectron2.engine.hooks import CallbackHook, PeriodicWriter
from detectron2.utils.events import CommonMetricPrinter
from training_runs import batch_of, make_trainer

from lite_detr.engine.progress import LOGGERS, ProgressBar, is_for_terminal

ITERATIONS = 4


@pytest.fixture
def loggers():
    """Restores the loggers, which have no handlers meanwhile."""
    found = {name: logging.getLogger(name) for name in LOGGERS}
    before = {name: (logger.handlers, logger.level) for name, logger in found.items()}
    for logger in found.values():
        logger.handlers = []
        logger.setLevel(logging.INFO)
    yield found
    for name, (handlers, level) in before.items():
        found[name].handlers = handlers
        found[name].setLevel(level)


def log_to(stream, loggers):
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    for logger in loggers.values():
        logger.addHandler(handler)


def train():
    """A run whose hooks log and print after every iteration, as evaluations do."""

    def say(trainer):
        logging.getLogger("detectron2.evaluation").info("evaluated %d", trainer.iter)
        print("DONE", end="")
        print(f" (t={trainer.iter} s)")
        sys.stderr.write(f"UserWarning {trainer.iter}\n")

    trainer = make_trainer([batch_of(1.0)] * ITERATIONS)
    with ProgressBar(0, ITERATIONS) as bar:
        printer = PeriodicWriter([CommonMetricPrinter(ITERATIONS)], period=1)
        trainer.register_hooks([CallbackHook(after_step=say), printer, bar])
        trainer.train(0, ITERATIONS)


def screen(text):
    """The lines of a terminal that shows a text."""
    lines = []
    for line in text.split("\n"):
        cells = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return lines


def read(terminal, chunks):
    # Closing the other end is an error, not an end.
    with contextlib.suppress(OSError):
        while chunk := os.read(terminal, 4096):
            chunks.append(chunk)


@pytest.mark.parametrize("columns", [120, 0])
def test_the_bar_stays_below_all_that_is_written(columns, loggers, monkeypatch, tmp_path):
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 40, columns, 0, 0))
    chunks = []
    reader = threading.Thread(target=read, args=(terminal, chunks))
    reader.start()
    with open(end, "w", buffering=1) as file, open(tmp_path / "log.txt", "w") as log:
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "stderr", file)
        log_to(file, loggers)
        log_to(log, loggers)
        train()
        assert (sys.stdout, sys.stderr) == (file, file)
        print("afterwards")
    reader.join(60)
    os.close(terminal)
    *lines, _ = screen(b"".join(chunks).decode())
    expected = [
        line
        for i in range(ITERATIONS)
        for line in (f"detectron2.evaluation: evaluated {i}", f"DONE (t={i} s)", f"UserWarning {i}")
    ]
    bars = [line for line in lines if line.startswith("training: ")]
    assert [line for line in lines if line in expected] == expected
    assert lines[-2:] == [bars[-1], "afterwards"]
    assert len(bars) == 1 and "100%" in bars[0] and f"{ITERATIONS}/{ITERATIONS} [" in bars[0]
    assert not any("total_loss" in line for line in lines)
    assert (tmp_path / "log.txt").read_text().count("total_loss") == ITERATIONS


def test_without_a_terminal_lines_are_plain(loggers, capsys):
    log_to(sys.stdout, loggers)
    train()
    said = capsys.readouterr()
    assert said.out.count("total_loss") == ITERATIONS
    assert "training: " not in said.out + said.err and "\r" not in said.out + said.err


def test_only_information_of_no_use_is_left_to_files():
    def shown(name, message, level=logging.INFO):
        return is_for_terminal(logging.LogRecord(name, level, "", 0, message, (), None))

    assert not shown("detectron2", "Environment info:\n...")
    assert not shown("detectron2.data.build", "Making batched data loader with batch_size=4")
    assert shown("detectron2.data.build", "Distribution of instances")
    assert shown("detectron2", "Environment is broken", logging.WARNING)
    assert shown("lite_detr", "Training")
