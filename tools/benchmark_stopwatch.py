"""A stopwatch for the parts of a model."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

OTHER = "other"


class Stopwatch:
    """Tells to which part each moment of a pass belongs: to the innermost one that is at work.

    So the parts make up the whole, and what none claims is ``other``. On a GPU the borders are
    events in its stream, which hold nothing up: a part's time is the GPU's, and where the GPU waits
    for the host, the wait is the part's whose border comes next. The GPU is waited for at the start
    and the end alone.

    Args:
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, device: str):
        self.device = device
        self._borders: list[tuple[str, float | torch.cuda.Event]] = []
        self._open: list[str] = []

    def watch(self, module: nn.Module, name: str) -> None:
        """Counts the module's calls as a part."""
        module.register_forward_pre_hook(lambda *_: self._enter(name))
        module.register_forward_hook(lambda *_: self._leave())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._enter(name)
        yield
        self._leave()

    def start(self) -> None:
        self._wait()
        self._borders, self._open = [], [OTHER]
        self._add_border()

    def stop(self) -> dict[str, float]:
        """The seconds of each part since the start."""
        self._add_border()
        self._wait()
        seconds: dict[str, float] = {}
        for (_, begin), (name, end) in zip(self._borders, self._borders[1:]):
            seconds[name] = seconds.get(name, 0.0) + self._seconds_between(begin, end)
        return seconds

    def _enter(self, name: str) -> None:
        self._add_border()
        self._open.append(name)

    def _leave(self) -> None:
        self._add_border()
        self._open.pop()

    def _add_border(self) -> None:
        """Ends a stretch of time, which belongs to the part that is open."""
        if self.device == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._borders.append((self._open[-1], now))

    def _seconds_between(self, begin: float | torch.cuda.Event, end) -> float:
        return begin.elapsed_time(end) / 1e3 if self.device == "cuda" else end - begin

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
