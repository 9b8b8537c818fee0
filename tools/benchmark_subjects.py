"""What a benchmark runs: detectors of configs, and how they compute."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from benchmark_optimized import optimized
from benchmark_records import Case
from detectron2.config import instantiate
from torch import Tensor, nn

from lite_detr import ops
from lite_detr.inference.optimize import COMPILED_PARTS
from lite_detr.modeling import attention
from lite_detr.modeling.detector import Detector
from lite_detr.overrides import load_config

PYTORCH = {
    "ms_deform_attn": ops.ms_deform_attn_pytorch,
    "key_aware_ms_deform_attn": ops.key_aware_ms_deform_attn_pytorch,
}


@dataclass
class Subject:
    """A model, and how to run it.

    Attributes:
        parts: the modules of each part; calls of others in between are no part's.
        num_classes: of the objects that it is trained on.
        predict: takes a batch in Detectron2's format.
        loss: takes such a batch with ground truth, and returns the sum of all losses.
        optimizer: steps the model; in inference there may be none.
    """

    model: nn.Module
    parts: Mapping[str, Sequence[nn.Module]]
    num_classes: int
    predict: Callable[[list[dict]], object]
    loss: Callable[[list[dict]], Tensor]
    optimizer: torch.optim.Optimizer | None

    def compile(self) -> None:
        """Lets ``torch.compile`` compile the parts, each alone, so that they can be told apart."""
        for name in COMPILED_PARTS:
            for module in self.parts[name]:
                # Not the module itself: hooks are not to be compiled along with it.
                module.forward = torch.compile(module.forward, dynamic=False)

    def held_bytes(self) -> int:
        """Of parameters, buffers and the optimizer's state."""
        states = self.optimizer.state.values() if self.optimizer else ()
        states = (value for state in states for value in state.values())
        tensors = itertools.chain(
            self.model.parameters(), self.model.buffers(), filter(torch.is_tensor, states)
        )
        return sum(tensor.nbytes for tensor in tensors)


def detector_subject(case: Case) -> Subject:
    """A detector of the model zoo's kind, with random weights and its config's optimizer.

    Raises:
        TypeError: the config's model is of another kind.
    """
    cfg = load_config(case.subject, case.overrides)
    model = optimized(build_detector(case.subject, case.overrides).to(case.device), case)
    cfg.optimizer.params.model = model
    names = ("backbone", "neck", "encoder", "queries", "decoder")
    parts = {name: [getattr(model, name)] for name in names}
    parts |= {"losses": [model.criterion], "matcher": [model.criterion.matcher]}
    denoising = getattr(model, "denoising", None)
    if denoising is not None:
        parts["queries"].append(denoising)
    return Subject(
        model=model,
        parts=parts,
        num_classes=model.num_classes,
        predict=model,
        loss=lambda batch: sum(model(batch).values()),
        # None is needed, and there would be no parameters for it.
        optimizer=instantiate(cfg.optimizer) if case.task == "training" else None,
    )


def build_detector(config: str, overrides: Sequence[str]) -> Detector:
    """
    Raises:
        TypeError: the config's model is of another kind.
    """
    model = instantiate(load_config(config, overrides).model)
    if not isinstance(model, Detector):
        raise TypeError(
            f"{config} has a {type(model).__name__}, accepted are lite_detr's detectors: "
            "the parts of others are not known"
        )
    return model


@contextlib.contextmanager
def operators(kind: str) -> Iterator[None]:
    """Lets the attention modules call the operators in PyTorch, where the kind is ``pytorch``."""
    with contextlib.ExitStack() as stack:
        if kind == "pytorch":
            for name, function in PYTORCH.items():
                stack.enter_context(mock.patch.object(attention, name, function))
        yield
