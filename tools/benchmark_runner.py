"""One case of a benchmark, ready to take its turns."""

import torch
from benchmark_data import RandomBatches
from benchmark_optimized import has_own_dtype, set_memory
from benchmark_records import Case
from benchmark_stopwatch import Stopwatch
from benchmark_subjects import Subject, detector_subject, operators
from benchmark_transformers import NAME as TRANSFORMERS
from benchmark_transformers import transformers_subject

# Of each case, before what counts: the optimizer's state is made, compilers and libraries decide.
WARM_UP = 2


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
