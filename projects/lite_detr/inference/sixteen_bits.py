"""Weights of 16 bits, but for what ranks queries and places boxes."""

import logging

import torch
from torch import Tensor, nn

from ..errors import OptimizationError
from ..modeling.detector import Detector
from ..modeling.queries import ProposalQueries

logger = logging.getLogger("lite_detr")


def to_sixteen_bits(detector: Detector, dtype: torch.dtype) -> None:
    """Casts a detector's weights, and leaves its heads in float32.

    The two-stage queries' scores decide which proposals become queries, and boxes add up over
    layers: 8 bits of mantissa tell neither neighbouring scores nor pixels apart. Pixels are
    normalised in float32, too, and geometry always is.

    Args:
        detector: in float32; it is changed.
        dtype: ``torch.bfloat16``, or on a GPU ``torch.float16``.

    Raises:
        OptimizationError: a CPU cannot compute in the dtype.
    """
    if detector.device.type == "cpu":
        if dtype == torch.float16:
            raise OptimizationError(
                "CPUs do not compute in float16: give bfloat16 or float32, or move the detector to "
                "a GPU first"
            )
        if not cpu_computes_in(dtype):
            logger.warning(
                "this CPU has no arithmetic for bfloat16 (AVX-512 or AMX): results are right, but "
                "come many times later than those of float32"
            )
    exact = keep_heads(detector)
    exact.append(detector.pixel_mean)
    exact.append(detector.pixel_std)
    kept = {id(tensor) for tensor in exact}

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and id(tensor) not in kept else tensor

    detector._apply(cast)


def cpu_computes_in(dtype: torch.dtype) -> bool:
    """Whether this CPU has arithmetic for a dtype other than float16, which none has.

    For bfloat16 that is AVX-512 or AMX. True also where PyTorch cannot tell.
    """
    # Builds of PyTorch without oneDNN lack it.
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return dtype != torch.bfloat16 or is_supported is None or is_supported()


def keep_heads(detector: Detector) -> list[Tensor]:
    """Puts a cast before each head; returns the weights that stay as they are."""
    decoder_heads = detector.decoder.heads
    lists = [decoder_heads.class_embed, decoder_heads.bbox_embed]
    for heads in lists:
        for index, head in enumerate(heads):
            heads[index] = InFloat32(head)
    queries = detector.queries
    if isinstance(queries, ProposalQueries):
        queries.class_embed = InFloat32(queries.class_embed)
        queries.bbox_embed = InFloat32(queries.bbox_embed)
        lists += [queries.class_embed, queries.bbox_embed]
    return [parameter for heads in lists for parameter in heads.parameters()]


class InFloat32(nn.Module):
    """A head with weights of float32 that takes queries of any dtype.

    Args:
        head: in float32.
    """

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, queries: Tensor) -> Tensor:
        """``[B, Q, C]`` of any dtype -> ``[B, Q, *]`` in float32."""
        return self.head(queries.float())
