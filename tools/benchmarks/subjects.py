"""The subjects of a benchmark: detectors of configs, optimized or not, and their operators."""

import contextlib
import copy
import ctypes
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import instantiate
from records import Case
from torch import Tensor, nn

from lite_detr import ops
from lite_detr.baselines import IMFADETR
from lite_detr.errors import ConfigError
from lite_detr.inference import keep_freed_memory, optimize
from lite_detr.inference.optimize import M_MMAP_MAX, M_TRIM_THRESHOLD
from lite_detr.modeling import KeyAwareDeformableAttention, MultiScaleDeformableAttention
from lite_detr.modeling.detector import Detector
from lite_detr.overrides import load_config

PYTORCH = {
    MultiScaleDeformableAttention: ops.fused_ms_deform_attn_pytorch,
    KeyAwareDeformableAttention: ops.fused_key_aware_ms_deform_attn_pytorch,
}

OFF, ON, MEMORY = "off", "on", "freed-memory"
STEPS = {
    "norms": optimize.fold_backbone_norms,
    "activations": optimize.overwrite_activations,
    "channels-last": optimize.use_channels_last,
    "geometry": optimize.keep_geometry,
}
CHOICES = (OFF, ON, *STEPS, MEMORY)

# glibc's limits as they are after some large blocks: mapped blocks, their size, the top to keep.
M_MMAP_THRESHOLD = -3
USUAL = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26}


@dataclass
class Subject:
    """A model, and how to run it.

    Attributes:
        parts: the modules of each part; all other calls belong to no part.
        num_classes: of the objects that it is trained on.
        predict: runs a batch in Detectron2's format.
        loss: returns the sum of all losses of such a batch with ground truth.
        optimizer: of the model; None for inference.
    """

    model: nn.Module
    parts: Mapping[str, Sequence[nn.Module]]
    num_classes: int
    predict: Callable[[list[dict]], object]
    loss: Callable[[list[dict]], Tensor]
    optimizer: torch.optim.Optimizer | None

    def compile(self) -> None:
        """Let ``torch.compile`` compile each part by itself, so that they are timed separately."""
        options = None
        if self.optimizer is None:
            options = optimize.compiler_options(next(self.model.parameters()).device)
        for name in optimize.COMPILED_PARTS:
            for module in self.parts[name]:
                # Not the module itself, as its hooks must not be compiled.
                module.forward = torch.compile(module.forward, dynamic=False, options=options)

    def held_bytes(self) -> int:
        """Return the bytes of parameters, buffers and the optimizer's state."""
        states = self.optimizer.state.values() if self.optimizer else ()
        states = (value for state in states for value in state.values())
        tensors = itertools.chain(
            self.model.parameters(), self.model.buffers(), filter(torch.is_tensor, states)
        )
        return sum(tensor.nbytes for tensor in tensors)


def detector_subject(case: Case) -> Subject:
    """Build a config's detector, with random weights and its config's optimizer.

    Raises:
        ConfigError: the config's model is of another kind.
    """
    cfg = load_config(case.subject, case.overrides)
    model = optimized(build_detector(case.subject, case.overrides).to(case.device), case)
    if case.task == "training" and case.device == "cpu":
        # As lite-detr train.
        optimize.use_channels_last(model)
    cfg.optimizer.params.model = model
    names = ("backbone", "neck", "encoder", "queries", "decoder")
    parts = {name: [getattr(model, name)] for name in names}
    if isinstance(model, IMFADETR):  # Calls the layers of both in turn.
        parts |= {name: list(getattr(model, name).layers) for name in ("encoder", "decoder")}
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
        # An optimized model has no parameters to train.
        optimizer=instantiate(cfg.optimizer) if case.task == "training" else None,
    )


def build_detector(config: str, overrides: Sequence[str]) -> Detector:
    """Build a config's detector, with random weights.

    Raises:
        ConfigError: the config's model is of another kind.
    """
    model = instantiate(load_config(config, overrides).model)
    if not isinstance(model, Detector):
        raise ConfigError(
            f"{config} has a {type(model).__name__}, accepted are lite_detr's detectors: "
            "the parts of others are not known"
        )
    return model


@contextlib.contextmanager
def operators(kind: str) -> Iterator[None]:
    """Let the attention modules call the operators in PyTorch if the kind is ``pytorch``."""
    own = {attention: attention.operator for attention in PYTORCH}
    try:
        if kind == "pytorch":
            for attention, operator in PYTORCH.items():
                attention.operator = staticmethod(operator)
        yield
    finally:
        for attention, operator in own.items():
            attention.operator = staticmethod(operator)


def optimized(model: Detector, case: Case) -> Detector:
    """Optimize a model as its case says; on CPUs, :func:`set_memory` does the rest."""
    if case.optimized == ON:
        return optimize.optimize_for_inference(model, getattr(torch, case.dtype))
    if case.optimized in STEPS:
        model = copy.deepcopy(model).eval().requires_grad_(False)
        STEPS[case.optimized](model)
    return model


def has_own_dtype(case: Case) -> bool:
    """Return whether the weights have the case's dtype, so that no autocast is needed."""
    return case.optimized == ON


def set_memory(case: Case) -> None:
    """Let the process keep freed memory, or return it to the system as usual.

    Cases of both kinds take turns in one process.
    """
    if case.device != "cpu":
        return
    if case.optimized in (ON, MEMORY):
        keep_freed_memory()
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for parameter, value in USUAL.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)
