"""One case of a benchmark, as it takes its turns with others: its time by parts, and its memory.

The peak memory of a case is counted in a process of its own, where no other case has left pages
behind that it could take over unseen, by :func:`calls.peak_memory`.
"""

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
from PIL import Image
from records import Case, Memory
from subjects import Subject, detector_subject, has_own_dtype, operators, set_memory
from torch import Tensor, nn

# Of each case, before what counts: the optimizer's state is made, compilers and libraries decide.
WARM_UP = 2
# A usual size in COCO.
FILE_HEIGHT, FILE_WIDTH = 480, 640
OBJECTS = 10
OTHER = "other"


class Runner:
    """Takes turns with others: each turn makes a batch and runs it, timed part by part.

    A training step is forward, losses, backward and the optimizer's step; with float16 under a
    gradient scaler, as Detectron2's ``AMPTrainer`` runs it.
    """

    def __init__(self, case: Case):
        torch.manual_seed(0)
        self.case = case
        self.subject: Subject = (
            transformers_subject(case) if case.subject == TRANSFORMERS else detector_subject(case)
        )
        self.training = case.task == "training"
        self.subject.model.train(self.training)
        if case.compiled:
            self.subject.compile()
        self.stopwatch = Stopwatch(case.device)
        for name, modules in self.subject.parts.items():
            for module in modules:
                self.stopwatch.watch(module, name)
        self.batches = RandomBatches(case.size, case.batch, self.subject.num_classes, self.training)
        self.scaler = torch.amp.GradScaler(case.device, enabled=case.dtype == "float16")

    def turn(self) -> dict[str, float]:
        """The seconds of each part of one turn."""
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


class RandomBatches:
    """Batches from a JPEG file, by Detectron2's mapper, which reads, resizes and converts.

    In training the mapper also mirrors, and brings 10 random objects for each image. Images and
    objects are the same each time, for every subject with as many classes.

    Args:
        size: of the images that the model takes, (height, width) in pixels.
        batch: images at a time.
        num_classes: of the objects.
        training: as for training, or as for inference.
    """

    def __init__(self, size: tuple[int, int], batch: int, num_classes: int, training: bool):
        folder = tempfile.TemporaryDirectory()
        weakref.finalize(self, folder.cleanup)
        random = np.random.default_rng(0)
        file = Path(folder.name, "image.jpg")
        # Coarse noise, enlarged: as many bytes as a photograph's, which plain noise exceeds.
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
        """A batch in Detectron2's format, whose collation is to make no more than a list."""
        return [self._mapper(record) for record in self._records]


def _random_object(random: np.random.Generator, num_classes: int) -> dict:
    """From a tenth to half of the image wide and high, wholly in it."""
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
    """As :func:`measure_memory`; errors are raised here as they are there."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as executor:
        return executor.submit(measure_memory, case).result()


def measure_memory(case: Case) -> Memory | None:
    """What a case takes; None where nothing tells."""
    torch.set_num_threads(case.threads)
    runner = Runner(case)
    (encoder,) = runner.subject.parts["encoder"]
    calls: list[tuple[list, dict]] = []
    handle = encoder.register_forward_pre_hook(
        lambda _, args, options: calls.append(_as_leaves(args, options)), with_kwargs=True
    )
    runner.turn()
    handle.remove()
    for _ in range(WARM_UP - 1):
        runner.turn()
    step = peak_memory(runner.turn, case.device)
    if step is None:
        return None
    _run_encoder(runner, encoder, *calls[0])
    return Memory(
        held=runner.subject.held_bytes(),
        step=step,
        encoder=peak_memory(lambda: _run_encoder(runner, encoder, *calls[0]), case.device),
    )


def _as_leaves(args: tuple, options: dict) -> tuple[list, dict]:
    """What a module is called with, cut off from what came before it."""

    def leaf(value: object) -> object:
        if isinstance(value, Tensor) and value.requires_grad:
            return value.detach().requires_grad_()
        return value

    return [leaf(value) for value in args], {name: leaf(value) for name, value in options.items()}


def _run_encoder(runner: Runner, encoder: nn.Module, args: list, options: dict) -> None:
    """The encoder alone, in training forward and backward."""
    with operators(runner.case.operators), torch.set_grad_enabled(runner.training):
        with runner.autocast():
            # forward itself, since the hooks are of the stopwatch.
            memory = encoder.forward(*args, **options)
        if runner.training:
            memory = memory if isinstance(memory, Tensor) else memory.last_hidden_state
            memory.backward(torch.ones_like(memory))
            encoder.zero_grad()
            for leaf in (*args, *options.values()):
                if isinstance(leaf, Tensor):
                    leaf.grad = None
