"""One case of a benchmark, as it takes its turns with others: its time by parts, and its memory.

The peak memory of a case is counted in a process of its own, where no other case has left pages
behind that it could take over unseen, by :func:`calls.peak_memory`.
"""

import functools
import multiprocessing
import tempfile
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import detectron2.data.transforms as T
import numpy as np
import torch
from calls import peak_memory
from competitor import NAME as TRANSFORMERS
from competitor import transformers_subject
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode
from efficientdet import NAME as EFFICIENTDET
from efficientdet import efficientdet_subject
from PIL import Image
from records import Case, Memory
from subjects import Subject, detector_subject, has_own_dtype, operators, set_memory
from torch import Tensor, nn

# Turns before the measured ones: the optimizer creates its state, compilers and libraries choose.
WARM_UP = 2
# Of a CPU, by the names of their functions.
CLOCKS = {"wall": "perf_counter", "process": "process_time"}
# A common size in COCO.
FILE_HEIGHT, FILE_WIDTH = 480, 640
OBJECTS = 10
OTHER = "other"


class Runner:
    """A case that takes turns: each makes a batch and runs it, timed part by part.

    A training step is forward, losses, backward and the optimizer's step; for float16 with a
    gradient scaler, as in Detectron2's ``AMPTrainer``.
    """

    def __init__(self, case: Case):
        torch.manual_seed(0)
        self.case = case
        self.subject = build_subject(case)
        self.training = case.task == "training"
        self.subject.model.train(self.training)
        if case.compiled:
            self.subject.compile()
        self.stopwatch = Stopwatch(case.device, case.clock)
        for name, modules in self.subject.parts.items():
            for module in modules:
                self.stopwatch.watch(module, name)
        self.batches = RandomBatches(case.size, case.batch, self.subject.num_classes, self.training)
        self.scaler = torch.amp.GradScaler(case.device, enabled=case.dtype == "float16")

    def turn(self) -> dict[str, float]:
        """Take one turn, and return the seconds of each part."""
        set_memory(self.case)
        self.stopwatch.start()
        with self.stopwatch.part("data"):
            batch = self.batches.next()
        with operators(self.case.operators):
            if self.training:
                self._train(batch)
            else:
                self._infer(batch)
        return self.stopwatch.stop()

    def autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.case.dtype)
        enabled = dtype != torch.float32 and not has_own_dtype(self.case)
        return torch.autocast(self.case.device, dtype, enabled=enabled)

    def _infer(self, batch: list[dict]) -> None:
        with torch.no_grad(), self.autocast():
            self.subject.predict(batch)

    def _train(self, batch: list[dict]) -> None:
        with self.autocast():
            loss = self.subject.loss(batch)
        with self.stopwatch.part("backward"):
            self.scaler.scale(loss).backward()
        with self.stopwatch.part("optimizer"):
            self.scaler.step(self.subject.optimizer)
            self.scaler.update()
            self.subject.optimizer.zero_grad()


def build_subject(case: Case) -> Subject:
    """Build what a case names: a competitor, or the detector of a config."""
    if case.subject == TRANSFORMERS:
        return transformers_subject(case)
    if case.subject == EFFICIENTDET:
        return efficientdet_subject(case)
    return detector_subject(case)


class Stopwatch:
    """Assigns each moment of a pass to a part: the innermost one that is running.

    So the parts add up to the whole, and moments of no part are ``other``. On a GPU the borders are
    events in its stream, which delay nothing: times are the GPU's, and if the GPU waits for the
    host, the wait belongs to the part whose border comes next. The host waits for the GPU only at
    the start and at the end.

    Args:
        device: ``cpu`` or ``cuda``.
        clock: of ``CLOCKS``, for the CPU.
    """

    def __init__(self, device: str, clock: str = "wall"):
        self.device = device
        self._clock = getattr(time, CLOCKS[clock])
        self._borders: list[tuple[str, float | torch.cuda.Event]] = []
        self._open: list[str] = []

    def watch(self, module: nn.Module, name: str) -> None:
        """Count the module's calls as a part."""
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
        """Return the seconds of each part since the start."""
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
        """End a stretch of time, which belongs to the innermost open part."""
        if self.device == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = self._clock()
        self._borders.append((self._open[-1], now))

    def _seconds_between(self, begin: float | torch.cuda.Event, end) -> float:
        return begin.elapsed_time(end) / 1e3 if self.device == "cuda" else end - begin

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


class RandomBatches:
    """Batches of a JPEG file with random objects, as a data loader's worker makes them.

    Detectron2's mapper reads, resizes and converts the image. In training it also mirrors the image
    and its 10 random objects. Images and objects are the same each time, and for all subjects with
    the same number of classes.

    Args:
        size: of the images that the model takes, (height, width) in pixels.
        batch: images at a time.
        num_classes: of the objects.
        training: whether batches are for training.
    """

    def __init__(self, size: tuple[int, int], batch: int, num_classes: int, training: bool):
        folder = tempfile.TemporaryDirectory()
        weakref.finalize(self, folder.cleanup)
        random = np.random.default_rng(0)
        file = Path(folder.name, "image.jpg")
        # Coarse noise, enlarged: about as many bytes as a photograph, unlike fine noise.
        noise = random.integers(0, 256, (FILE_HEIGHT // 8, FILE_WIDTH // 8, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((FILE_WIDTH, FILE_HEIGHT), Image.Resampling.BICUBIC)
        image.save(file, quality=95)
        flip = [T.RandomFlip(prob=1.0)] if training else []
        self._mapper = DatasetMapper(
            is_train=training, augmentations=[*flip, T.Resize(size)], image_format="RGB"
        )
        self._records = [
            {
                "file_name": str(file),
                "height": FILE_HEIGHT,
                "width": FILE_WIDTH,
                "annotations": [_random_object(random, num_classes) for _ in range(OBJECTS)],
            }
            for _ in range(batch)
        ]

    def next(self) -> list[dict]:
        """Return a batch in Detectron2's format, which a list already is."""
        return [self._mapper(record) for record in self._records]


def _random_object(random: np.random.Generator, num_classes: int) -> dict:
    """Return an annotation: a tenth to half of the image wide and high, entirely inside it."""
    extent = random.uniform(0.1, 0.5, 2)
    corner = random.uniform(0, 1 - extent)
    box = np.concatenate([corner, corner + extent]) * np.tile([FILE_WIDTH, FILE_HEIGHT], 2)
    return {
        "bbox": box.tolist(),
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": int(random.integers(num_classes)),
        "iscrowd": 0,
    }


def memory_in_own_process(case: Case) -> Memory | None:
    """Run :func:`measure_memory` in a process of its own, whose errors are raised here."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as executor:
        return executor.submit(measure_memory, case).result()


def measure_memory(case: Case) -> Memory | None:
    """Measure the memory of a case; None if the system does not tell it."""
    torch.set_num_threads(case.threads)
    runner = Runner(case)
    calls: dict[nn.Module, tuple[list, dict]] = {}

    def keep(module: nn.Module, args: tuple, options: dict) -> None:
        calls[module] = _as_leaves(args, options)

    handles = [
        module.register_forward_pre_hook(keep, with_kwargs=True)
        for module in runner.subject.parts["encoder"]
    ]
    runner.turn()
    for handle in handles:
        handle.remove()
    for _ in range(WARM_UP - 1):
        runner.turn()
    step = peak_memory(runner.turn, case.device)
    if step is None:
        return None
    peaks = []
    for module, (args, options) in calls.items():
        _run_encoder(runner, module, args, options)
        run = functools.partial(_run_encoder, runner, module, args, options)
        peaks.append(peak_memory(run, case.device))
    return Memory(held=runner.subject.held_bytes(), step=step, encoder=max(peaks))


def _as_leaves(args: tuple, options: dict) -> tuple[list, dict]:
    """Return the arguments of a module's call, detached from what came before."""

    def leaf(value: object) -> object:
        if isinstance(value, Tensor) and value.requires_grad:
            return value.detach().requires_grad_()
        return value

    return [leaf(value) for value in args], {name: leaf(value) for name, value in options.items()}


def _run_encoder(runner: Runner, encoder: nn.Module, args: list, options: dict) -> None:
    """Run the encoder alone, in training forward and backward."""
    with operators(runner.case.operators), torch.set_grad_enabled(runner.training):
        with runner.autocast():
            # forward itself, to bypass the stopwatch's hooks.
            memory = encoder.forward(*args, **options)
        if runner.training:
            memory = memory if isinstance(memory, Tensor) else memory.last_hidden_state
            memory.backward(torch.ones_like(memory))
            encoder.zero_grad()
            for leaf in (*args, *options.values()):
                if isinstance(leaf, Tensor):
                    leaf.grad = None
