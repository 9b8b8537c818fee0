"""A model of one weight, whose losses and gradients a test chooses by the batches."""

from types import SimpleNamespace

import torch
from detectron2.utils.events import EventStorage
from torch import nn

from lite_detr.engine.trainer import Trainer
from lite_detr.optimizer import ClippedAdamW


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


def make_trainer(batches, **options):
    model = Toy()
    optimizer = ClippedAdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    return Trainer(model, batches, optimizer, **options)


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
