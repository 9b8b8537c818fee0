"""Multiply-adds, parameters and tokens of a detector, counted by fvcore."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from ..modeling import attention
from ..modeling.detector import Detector, evaluating
from ..ops import key_aware_ms_deform_attn, ms_deform_attn

# The parts whose operations are told apart; the total also holds the neck and the proposals.
PARTS = ("backbone", "encoder", "decoder")


@dataclass(frozen=True)
class ModelCost:
    """What one image costs a detector.

    Attributes:
        flops: multiply-adds of the whole model, and of each of ``PARTS``; a multiply-add is one
            operation, as papers on detectors count.
        parameters: all of them, frozen ones too; statistics of normalisations are none.
        tokens: of each scale, high resolution first.
    """

    flops: dict[str, float]
    parameters: int
    tokens: tuple[int, ...]


def count_cost(model: Detector, height: int, width: int) -> ModelCost:
    """Counts what a detector does for one image, whichever operators run.

    As in counts of the reference implementations, bilinear sampling is not counted, while the two
    dot products of key-aware attention are.
    """
    image = torch.zeros(3, height, width, device=model.device)
    with evaluating(model), _single_operators(), torch.no_grad():
        inference = _Inference(model)
        counter = FlopCountAnalysis(inference, (image,))
        counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counter.tracer_warnings("none")
        counter.set_op_handle("lite_detr_flops::ms_deform_attn", _count_nothing)
        counter.set_op_handle("lite_detr_flops::key_aware_ms_deform_attn", _count_dot_products)
        counter.set_op_handle("aten::scaled_dot_product_attention", _count_self_attention)
        by_module = counter.by_module()
    flops = {"total": float(by_module[""])}
    flops |= {part: float(by_module[f"detector.{part}"]) for part in PARTS}
    return ModelCost(
        flops=flops,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=inference.tokens,
    )


class _Inference(nn.Module):
    """A detector as a function of one image, since fvcore traces functions of tensors.

    Attributes:
        tokens: of each scale of the last image.
    """

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector
        self.tokens: tuple[int, ...] = ()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        images = self.detector.preprocess_images([{"image": image}])
        memory, scales = self.detector.encode(images)
        self.tokens = tuple(int(height) * int(width) for height, width in scales.shapes)
        return tuple(self.detector.predict(memory, scales))


# The operators under names of their own, which a tracer does not look into.
_ms_deform_attn = torch.library.custom_op(
    "lite_detr_flops::ms_deform_attn", ms_deform_attn, mutates_args=()
)
_key_aware_ms_deform_attn = torch.library.custom_op(
    "lite_detr_flops::key_aware_ms_deform_attn", key_aware_ms_deform_attn, mutates_args=()
)


@contextlib.contextmanager
def _single_operators() -> Iterator[None]:
    """Shows each attention to a tracer as one operator, so that its parts are not counted."""
    with (
        mock.patch.object(attention, "ms_deform_attn", _ms_deform_attn),
        mock.patch.object(attention, "key_aware_ms_deform_attn", _key_aware_ms_deform_attn),
    ):
        yield


def _count_nothing(inputs: list, outputs: list) -> Counter:
    return Counter(ms_deform_attn=0)


def _count_dot_products(inputs: list, outputs: list) -> Counter:
    """Query times key and weight times value, for each of the ``L * P`` points of a query."""
    batch, queries, heads, channels = inputs[0].type().sizes()
    levels, points = inputs[5].type().sizes()[3:5]
    return Counter(
        key_aware_ms_deform_attn=2 * batch * queries * heads * channels * levels * points
    )


def _count_self_attention(inputs: list, outputs: list) -> Counter:
    """Query times key and weight times value, for each pair of queries."""
    batch, heads, queries, channels = inputs[0].type().sizes()
    keys = inputs[1].type().sizes()[2]
    return Counter(attention=2 * batch * heads * queries * keys * channels)
