"""What makes a trained detector faster without another result."""

import copy
import logging

import torch
from torch import nn

from ..modeling.backbone.padding import batch_images
from ..modeling.detector import Detector
from ..modeling.feed_forward import FeedForward
from ..modeling.heads import MLP
from .fold_norms import fold_norms
from .kept_geometry import KeptGeometry
from .memory import keep_freed_memory
from .sixteen_bits import to_sixteen_bits

logger = logging.getLogger("lite_detr")

# By the names that programs give them.
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
# Those whose work depends on nothing but the shapes of their inputs.
COMPILED_PARTS = ("backbone", "neck", "encoder", "decoder")


def optimize_for_inference(
    model: Detector, dtype: torch.dtype | None = None, compile: bool = False
) -> Detector:
    """A copy of a detector that is only to be run: the same contract and results, sooner.

    - Batch norms of the backbone are folded into its convolutions.
    - On CPUs, and on GPUs with 16 bits, convolutions compute with channels last.
    - Position encodings and reference points are kept for the image shapes that were met last.
    - Activations overwrite their inputs.
    - On request weights have 16 bits. Scores and boxes, of the two-stage queries too, are still
      float32.

    Which of it pays how much: docs/inference.md. On a CPU call :func:`keep_freed_memory` besides.

    Args:
        model: trained, on the device that it is to run on, in float32.
        dtype: of the weights, ``torch.bfloat16`` or, on a GPU, ``torch.float16``; None or
            ``torch.float32`` leaves them.
        compile: lets ``torch.compile`` compile backbone, neck, encoder and decoder, which the first
            image and then some new image shapes wait for.

    Raises:
        TypeError: the model is no detector of this package, or its weights are not float32.
        ValueError: ``dtype`` is another.
        OptimizationError: the model's device does not compute in ``dtype``, or the backbone's norms
            cannot be folded, see :func:`fold_norms`.
    """
    if not isinstance(model, Detector):
        raise TypeError(
            f"optimize_for_inference takes a detector of lite_detr, got {type(model).__name__}"
            + (": give its .module" if hasattr(model, "module") else "")
        )
    found = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if found:
        raise TypeError(
            f"optimize_for_inference takes weights in torch.float32, got {found.pop()}: give the "
            "detector as it was trained"
        )
    dtype = dtype or torch.float32
    if dtype not in DTYPES.values():
        accepted = ", ".join(map(str, DTYPES.values()))
        raise ValueError(f"dtype is {dtype}, accepted are {accepted} and None")
    optimized = copy.deepcopy(model).eval().requires_grad_(False)
    num_folded = fold_backbone_norms(optimized)
    overwrite_activations(optimized)
    if dtype != torch.float32:
        to_sixteen_bits(optimized, dtype)
    if optimized.device.type == "cpu" or dtype != torch.float32:
        use_channels_last(optimized)
    keep_geometry(optimized)
    if compile:
        compile_parts(optimized)
    logger.info(
        "optimized for inference: %d batch norms folded, weights in %s%s",
        num_folded,
        str(dtype).removeprefix("torch."),
        ", compiled" if compile else "",
    )
    return optimized


def optimize_for_program(model: Detector, dtype: str) -> Detector:
    """As :func:`optimize_for_inference`, where the whole process is there for the model alone.

    On a CPU it keeps freed memory besides.

    Args:
        dtype: one of the names in ``DTYPES``.
    """
    if model.device.type == "cpu":
        keep_freed_memory()
    return optimize_for_inference(model, DTYPES[dtype])


def fold_backbone_norms(detector: Detector) -> int:
    """The number of batch norms that have become parts of convolutions."""
    backbone = detector.backbone
    noise = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    image = batch_images([noise.to(detector.device)], backbone).tensor
    return fold_norms(backbone, lambda: backbone(image))


def overwrite_activations(detector: Detector) -> None:
    """Their inputs are linear layers' outputs, which nothing else needs without gradients."""
    for module in detector.modules():
        if isinstance(module, (FeedForward, MLP)):
            for child in module.children():
                if isinstance(child, nn.ReLU):
                    child.inplace = True


def use_channels_last(detector: Detector) -> None:
    """Convolutions compute in the layout of their weights; tokens have their channels last, too."""
    for part in (detector.backbone, detector.neck):
        part.to(memory_format=torch.channels_last)


def keep_geometry(detector: Detector) -> None:
    """Where tokens are depends on the shapes of images alone."""
    detector.locate_tokens = KeptGeometry(detector.locate_tokens)


def compile_parts(detector: Detector) -> None:
    """Each part alone, as what is between them depends on values."""
    for name in COMPILED_PARTS:
        part = getattr(detector, name)
        # Not the module itself: hooks are not to be compiled along with it.
        part.forward = torch.compile(part.forward)
