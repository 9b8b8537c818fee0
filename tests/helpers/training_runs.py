"""Training runs: of a toy model in this process, of a detector in a process that is killed where
a test says, and of two processes together.

Other processes fork from the server of ``programs``, which has imported PyTorch.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.hooks import CallbackHook, EvalHook, PeriodicWriter
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from programs import CONFIGS, FORKS
from small_detectors import gradients, small_detector, small_inputs
from torch import distributed, nn

import lite_detr.engine.training  # noqa: F401  # where a test gives it a signal
from lite_detr import cli
from lite_detr.checkpoint import DetrCheckpointer
from lite_detr.commands.train import run
from lite_detr.data.coco import apply_data_config
from lite_detr.engine.best import BestCheckpointer
from lite_detr.engine.ema import EMA
from lite_detr.engine.preemption import Preemption
from lite_detr.engine.resume import Records, ResumePoint
from lite_detr.engine.trainer import Trainer
from lite_detr.errors import DivergenceError, SaveError, raised_in_all
from lite_detr.modeling.criterion import count_objects
from lite_detr.optimizer import ClippedAdamW
from lite_detr.random_states import seed_sample

CONFIG = CONFIGS / "resumable.py"


class Toy(nn.Module):
    """``loss_a`` is the weight times the batch's mean value, and ``loss_b`` is 1.

    A batch with ``steep`` has a finite loss, whose gradient is NaN.
    """

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, batch, num_objects=None):
        self.steps += 1
        mean = sum(inputs["value"] for inputs in batch) / len(batch)
        loss = (self.weight * mean).sum()
        if any("steep" in inputs for inputs in batch):
            loss = loss + (self.weight * 0).sqrt().sum() * 0
        return {"loss_a": loss, "loss_b": self.weight.new_ones(())}


def batch_of(value, name="a.jpg", **more):
    return [{"value": value, "file_name": name, "instances": range(1)} | more]


def make_trainer(batches, kind=Trainer, **options):
    model = Toy()
    optimizer = ClippedAdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    return kind(model, batches, optimizer, **options)


def record(trainer):
    """The scalars that a trainer has put into its storage, each with its iterations."""
    histories = trainer.storage.histories()
    return {name: history.values() for name, history in histories.items()}


def one_step(trainer, iteration=0):
    """A step outside of a training."""
    trainer.iter = iteration
    with EventStorage(iteration) as trainer.storage:
        trainer.run_step()
    return SimpleNamespace(scalars=record(trainer))


def train(*options: str, resume: bool = False, prepare: Callable[[], None] | None = None) -> int:
    """Trains in a process of its own and returns how it ended, as ``Process.exitcode`` says it.

    Args:
        options: of the config.
        resume: the training goes on.
        prepare: called in that process before the training; a function of a module.
    """
    process = FORKS.Process(target=_run_train_net, args=(options, resume, prepare))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def _run_train_net(options: list[str], resume: bool, prepare: Callable[[], None] | None) -> None:
    # Data workers are forked, as they are from a program.
    multiprocessing.set_start_method("fork", force=True)
    if prepare is not None:
        prepare()
    run(
        argparse.Namespace(
            config_file=str(CONFIG), resume=resume, eval_only=False, opts=list(options)
        )
    )


def signal_at(owner: str, name: str, nth: int, number: int = signal.SIGKILL) -> None:
    """Lets this process get a signal when something is called for the nth time, from 1 on.

    As from Slurm, its workers get it, too.

    Args:
        owner: a module or a class of a module, such as ``os`` or
            ``lite_detr.engine.training:ResumePoint``.
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


def run_in_processes(job, folder: Path, *arguments, world_size: int = 2) -> list:
    """What ``job(folder, *arguments)`` returns in each process, through PyTorch's files."""
    processes = [
        FORKS.Process(target=_join, args=(job, rank, world_size, folder, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * world_size
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def _join(job, rank: int, world_size: int, folder: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size
    )
    comm.create_local_process_group(world_size)
    torch.save(job(folder, *arguments), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def count(folder: Path) -> float:
    """Of an image with 3 objects in the first process, and one with 6 in the second."""
    inputs = small_inputs(3 * (comm.get_rank() + 1))
    return count_objects(inputs, torch.device("cpu")).item()


def learn(folder: Path, cases: dict[str, tuple]) -> dict[str, dict]:
    """The gradients of each case: a detector, the number of objects of all images, and how many
    batches each process makes of its half of them."""
    found = {}
    for case, (name, objects, accumulation) in cases.items():
        model = create_ddp_model(small_detector(name), device_ids=None)
        own = share(small_inputs(*objects), comm.get_world_size())[comm.get_rank()]
        optimizer = ClippedAdamW(model.parameters(), lr=1e-4)
        trainer = Trainer(model, [], optimizer, accumulation=accumulation)
        losses = trainer.accumulate(share(own, accumulation))
        found[case] = {"losses": losses, "gradients": gradients(model.module)}
    return found


def share(inputs: list[dict], parts: int) -> list[list[dict]]:
    size = len(inputs) // parts
    return [inputs[start : start + size] for start in range(0, len(inputs), size)]


def diverge(folder: Path, max_bad_batches: int) -> str:
    """One bad batch of the second process; what both processes say, and the last weights."""
    good, bad = batch_of(1.0, f"good{comm.get_rank()}.jpg"), batch_of(math.nan, "bad.jpg")
    trainer = make_trainer(
        [good, bad if comm.get_rank() == 1 else good, good], max_bad_batches=max_bad_batches
    )
    trainer.model = create_ddp_model(trainer.model, device_ids=None)
    try:
        trainer.train(0, 3)
    except DivergenceError as error:
        return str(error)
    return f"{trainer.bad_batches} bad, {trainer.model.module.weight.tolist()}"


class Killed(BaseException):
    """Ends a run as SIGKILL does, with no hook after it."""


class MortalTrainer(Trainer):
    def after_train(self):
        if not isinstance(sys.exc_info()[1], Killed):
            super().after_train()


def evaluated_run(
    folder: Path,
    values: list[float | None],
    kill_at: int = 0,
    *,
    patience: int = 2,
    metric: str = "bbox/AP",
    resume: bool = True,
) -> MortalTrainer:
    """A toy run whose evaluation after iteration i finds ``values[i]``; None: nothing.

    Args:
        kill_at: the run is killed at this one of its events, from 1 on: the moments before a file
            gets its name, before an evaluation, after one, and before records are written. Two
            processes have evaluations alone in common, and are killed together.
    """
    events = itertools.count(1)

    def event(common: bool = False):
        if (common or comm.get_world_size() == 1) and next(events) == kill_at:
            raise Killed

    def evaluate():
        event(common=True)
        value = values[min(trainer.iter, len(values) - 1)]
        if value is None or not comm.is_main_process():
            return {}
        return {"bbox": {"AP": value}, "bbox_ema": {"AP": value}}

    seed_sample(0)
    trainer = make_trainer([batch_of(1.0)] * len(values), kind=MortalTrainer)
    # Without a decoder, a checkpoint holds no detector.
    trainer.model.decoder = nn.Linear(1, 1)
    checkpointer = DetrCheckpointer(trainer.model, str(folder), trainer=trainer)
    ema = EMA(trainer.model, 0.9, str(folder))
    checkpointer.add_checkpointable("ema", ema.averaged)
    records = Records(folder, len(values))
    point = ResumePoint(checkpointer, None, records, Preemption(), 1, period=3)
    model = ema.averaged.module if "ema" in metric else trainer.model
    best = BestCheckpointer(model, str(folder), metric, 1, patience)
    after_evaluation = CallbackHook(after_step=lambda _: event(common=True))
    trainer.register_hooks([ema, point, EvalHook(1, evaluate), after_evaluation, best])
    checkpointer.resume_or_load("", resume=resume)
    if comm.is_main_process():
        before_records = CallbackHook(after_step=lambda _: event())
        # Without TensorBoard, whose writer takes longest.
        writers = PeriodicWriter(point.writers(resume)[:2], 2)
        trainer.register_hooks([before_records, writers])
    replace = os.replace

    def replace_or_die(*arguments):
        event()
        replace(*arguments)

    with mock.patch("os.replace", replace_or_die), contextlib.suppress(Killed):
        trainer.train(trainer.iter + 1 if checkpointer.resumed else 0, len(values))
    trainer.killed = kill_at > 0 and next(events) == kill_at + 1
    return trainer


def evaluate_together(folder: Path, values: list[float], runs: dict[str, list[int]]) -> dict:
    """In each process: where each start of each run ends, and the best that it knows then.

    Args:
        runs: of each run, the event at which each of its starts is killed; 0: none.
    """
    ends = {}
    for name, kills in runs.items():
        for kill_at in kills:
            trainer = evaluated_run(folder / name, values, kill_at)
            [best] = [hook for hook in trainer.hooks if isinstance(hook, BestCheckpointer)]
            ends[name] = (trainer.iter, trainer.stopped, best.best_metric, best.best_iter)
            comm.synchronize()
    return ends


def train_on_a_full_disk(folder: Path, options: list[str]) -> tuple[int, str]:
    """How each process ends, and what it says, when the first one can write no checkpoint."""
    cli.PATIENCE = 0.0
    if comm.is_main_process():
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, most))
    args = argparse.Namespace(config_file=str(CONFIG), resume=False, eval_only=False, opts=options)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            run(args)
        except SystemExit as end:
            return end.code, said.getvalue()
    return 0, said.getvalue()


def fail_in_the_first(folder: Path) -> str:
    try:
        with raised_in_all(SaveError):
            if comm.is_main_process():
                raise SaveError("the disk is full")
    except SaveError as error:
        return str(error)
    return "nothing"


def evaluate(folder: Path, config: str, options: list[str]) -> dict[str, int]:
    """How many detections the evaluator gathered of each image; empty but in the first process."""
    cfg = LazyConfig.apply_overrides(LazyConfig.load(config), options)
    apply_data_config(cfg, ("test",))
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    if not comm.is_main_process():
        return {}
    detections = json.loads((folder / "coco_instances_results.json").read_text())
    images = [str(detection["image_id"]) for detection in detections]
    return {image: images.count(image) for image in images}
