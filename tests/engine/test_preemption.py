"""Signals of schedulers: noted, agreed upon by all processes, and passed on."""

import multiprocessing
import os
import signal
import subprocess
import time

import pytest
from detectron2.utils import comm

from lite_detr.engine.preemption import EXIT_CODE, Preemption
from lite_detr.signals import SIGNALS, outlive_signals, passing_signals_on


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_work_goes_on(number):
    with Preemption() as preemption:
        assert not preemption.agreed()
        send(number)
        assert preemption.agreed()


def test_outside_of_the_training_signals_do_what_they_did_before():
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with Preemption():
        assert all(signal.getsignal(number) not in handlers for number in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


def test_one_process_that_is_asked_is_enough(monkeypatch):
    monkeypatch.setattr(comm, "all_gather", lambda mine: [mine, True])
    with Preemption() as preemption:
        assert preemption.agreed()


def test_behind_a_checkpoint_a_signal_ends_the_process_at_once():
    with Preemption() as preemption:
        with pytest.raises(SystemExit) as end, preemption.leaving_at_once():
            send(signal.SIGTERM)
            time.sleep(5)
        assert end.value.code == EXIT_CODE == 75


def test_one_that_came_just_before_does_so_too():
    with Preemption() as preemption:
        send(signal.SIGTERM)
        with pytest.raises(SystemExit), preemption.leaving_at_once():
            raise AssertionError("not reached")


def test_what_a_signal_breaks_in_other_processes_is_no_error():
    with pytest.raises(SystemExit) as end, Preemption():
        send(signal.SIGTERM)
        raise RuntimeError("DataLoader worker exited unexpectedly")
    assert end.value.code == EXIT_CODE


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="out of memory"), Preemption():
        raise RuntimeError("out of memory")


def wait_for(ready, number):
    with Preemption() as preemption:
        ready.set()
        for _ in range(1000):
            if preemption.requested:
                raise SystemExit(EXIT_CODE)
            time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_starting_process_passes_signals_on(number):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=wait_for, args=(ready, number))
    with passing_signals_on():
        child.start()
        assert ready.wait(30)
        send(number)
        child.join(30)
    assert child.exitcode == EXIT_CODE


def alone():
    with passing_signals_on():
        send(signal.SIGTERM)
        time.sleep(5)


def test_a_process_that_has_started_no_other_ends_as_it_would():
    child = multiprocessing.get_context("fork").Process(target=alone)
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGTERM


def work(ready, done):
    outlive_signals()
    ready.set()
    assert done.wait(30)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_worker_outlives_what_others_send_it(number):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    worker = context.Process(target=work, args=(ready, done))
    worker.start()
    assert ready.wait(30)
    for _ in range(2):
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
    done.set()
    worker.join(30)
    assert worker.exitcode == 0


def test_a_worker_ends_when_its_loader_ends_it():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=work, args=(ready, context.Event()))
    worker.start()
    assert ready.wait(30)
    start = time.monotonic()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0 and time.monotonic() - start < 20
