"""Count the multiply-adds, parameters and tokens of a detector, with fvcore."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from ..modeling.attention import KeyAwareDeformableAttention, MultiScaleDeformableAttention
from ..modeling.detector import Detector, evaluating
from ..ops import fused_key_aware_ms_deform_attn, fused_ms_deform_attn
from ..ops.sampling import flatten, unflatten

# The parts that are counted separately; the total also includes the neck and the proposals.
PARTS = ("backbone", "encoder", "decoder")


@dataclass(frozen=True)
class ModelCost:
    """The cost of one image.

    Attributes:
        flops: multiply-adds of the whole model (``total``) and of each of ``PARTS``; a multiply-add
            is one operation, as papers on detectors count.
        parameters: the number of all parameters, frozen ones included; statistics of normalisations
            are not parameters.
        tokens: the number on each scale, high resolution first.
    """

    flops: dict[str, float]
    parameters: int
    tokens: tuple[int, ...]


def count_cost(model: Detector, height: int, width: int) -> ModelCost:
    """Count what a detector does for one image, whichever operators run.

    As in the counts of the reference implementations, bilinear sampling is not counted, and the two
    dot products of key-aware attention are.
    """
    image = torch.zeros(3, height, width, device=model.device)
    with evaluating(model), single_operators(model), torch.no_grad():
        inference = SingleImageDetector(model)
        counter = FlopCountAnalysis(inference, (image,))
        counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counter.tracer_warnings("none")
        counter.set_op_handle("lite_detr_flops::ms_deform_attn", count_nothing)
        counter.set_op_handle("lite_detr_flops::key_aware_ms_deform_attn", count_dot_products)
        counter.set_op_handle("aten::scaled_dot_product_attention", count_self_attention)
        by_module = counter.by_module()
    flops = {"total": float(by_module[""])}
    flops |= {part: float(by_module[f"detector.{part}"]) for part in PARTS}
    return ModelCost(
        flops=flops,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=inference.tokens,
    )


class SingleImageDetector(nn.Module):
    """A detector as a function of one image, since fvcore traces functions of tensors.

    Attributes:
        tokens: of each scale of the latest image.
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
@torch.library.custom_op("lite_detr_flops::ms_deform_attn", mutates_args=())
def _ms_deform_attn(
    value: Tensor,
    sizes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    pairs = unflatten(sizes)
    return fused_ms_deform_attn(value, pairs, reference_points, sampling_offsets, attention_logits)


@torch.library.custom_op("lite_detr_flops::key_aware_ms_deform_attn", mutates_args=())
def _key_aware_ms_deform_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
) -> Tensor:
    return fused_key_aware_ms_deform_attn(
        query, key, value, unflatten(sizes), reference_points, sampling_offsets
    )


def msda_by_numbers(value: Tensor, sizes: Sequence[tuple], *others: Tensor) -> Tensor:
    return _ms_deform_attn(value, list(map(int, flatten(sizes))), *others)


def key_aware_by_numbers(
    query: Tensor, key: Tensor, value: Tensor, sizes: Sequence[tuple], *others: Tensor
) -> Tensor:
    numbers = list(map(int, flatten(sizes)))
    return _key_aware_ms_deform_attn(query, key, value, numbers, *others)


SINGLE_OPERATORS = {
    MultiScaleDeformableAttention: msda_by_numbers,
    KeyAwareDeformableAttention: key_aware_by_numbers,
}


@contextlib.contextmanager
def single_operators(model: nn.Module) -> Iterator[None]:
    """Show each of the model's attentions to a tracer as one operator.

    Otherwise the tracer would count the steps of the operators in PyTorch.
    """
    attentions = {
        module: operator
        for module in model.modules()
        for kind, operator in SINGLE_OPERATORS.items()
        if isinstance(module, kind)
    }
    for attention, operator in attentions.items():
        attention.operator = operator
    try:
        yield
    finally:
        for attention in attentions:
            del attention.operator


def count_nothing(inputs: list, outputs: list) -> Counter:
    return Counter(ms_deform_attn=0)


def count_dot_products(inputs: list, outputs: list) -> Counter:
    """Count query times key and weight times value, for each of a query's ``L * P`` points."""
    batch, queries, heads, channels = inputs[0].type().sizes()
    levels, points = inputs[5].type().sizes()[3:5]
    return Counter(
        key_aware_ms_deform_attn=2 * batch * queries * heads * channels * levels * points
    )


def count_self_attention(inputs: list, outputs: list) -> Counter:
    """Count query times key and weight times value, for each pair of queries."""
    batch, heads, queries, channels = inputs[0].type().sizes()
    keys = inputs[1].type().sizes()[2]
    return Counter(attention=2 * batch * heads * queries * keys * channels)
