"""The encoder that a YAML config names, as branches of a lazy model."""

import re

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from ..modeling import (
    DeformableEncoder,
    InterleavedEncoder,
    KeyAwareDeformableAttention,
    MultiScaleDeformableAttention,
)

NOTATION = re.compile(r"H(\d+)L(\d+)-\((\d+)\+1\)x(\d+)")
ATTENTIONS = {
    "deformable": MultiScaleDeformableAttention,
    "key_aware": KeyAwareDeformableAttention,
}


def set_encoder(model: DictConfig, encoder: str, num_levels: int | None) -> None:
    """Gives a lazy model the encoder of a name.

    Args:
        model: a detector's lazy config.
        encoder: ``full``, or the paper's notation: ``H3L1-(2+1)x3`` are 3 high-level scales, 1
            low-level scale and 3 blocks of 2 updates.
        num_levels: the number of scales, if it is given elsewhere.

    Raises:
        ValueError: the name is of neither kind, or contradicts ``num_levels``.
    """
    prototype = model.encoder.layer
    if encoder == "full":
        if "num_blocks" in model.encoder:
            num_layers = model.encoder.num_blocks * model.encoder.updates_per_block
            model.encoder = L(DeformableEncoder)(layer=prototype, num_layers=num_layers)
        return
    match = NOTATION.fullmatch(encoder)
    if match is None:
        raise ValueError(
            f"MODEL.DETR.ENCODER is {encoder!r}; accepted are 'full' and the notation of the "
            "paper, such as 'H3L1-(2+1)x3': 3 high-level scales, 1 low-level scale, 3 blocks of "
            "2 updates"
        )
    num_high, num_low, updates_per_block, num_blocks = map(int, match.groups())
    if num_levels not in (None, num_high + num_low):
        raise ValueError(
            f"MODEL.DETR.ENCODER {encoder!r} has {num_high + num_low} scales, "
            f"MODEL.DETR.NUM_LEVELS says {num_levels}: leave that out, or make them agree"
        )
    model.num_levels = num_high + num_low
    model.encoder = L(InterleavedEncoder)(
        layer=prototype,
        num_high_levels=num_high,
        num_blocks=num_blocks,
        updates_per_block=updates_per_block,
    )


def set_attention(model: DictConfig, attention: str) -> None:
    """Gives the encoder and the decoder of a lazy model one of :data:`ATTENTIONS`."""
    if attention not in ATTENTIONS:
        raise ValueError(
            f"MODEL.DETR.ATTENTION is {attention!r}; accepted are {', '.join(ATTENTIONS)}"
        )
    node = model.encoder.layer.attention
    node._target_ = ATTENTIONS[attention]
    if attention == "deformable":
        node.pop("key_proj", None)
