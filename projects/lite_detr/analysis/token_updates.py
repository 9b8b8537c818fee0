"""Count which of an image's multi-scale tokens an encoder updates, layer by layer."""

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import UnknownPartError
from ..modeling import DeformableEncoder, InterleavedEncoder, Scales
from .attention_maps import find_attentions, record_attention
from .figures import EncoderUpdates, TokenGrid


@torch.no_grad()
def updated_levels(encoder: nn.Module) -> list[tuple[int, ...]]:
    """Return the scales whose tokens each layer updates, by the queries of its attention.

    The finest scale is 0. A layer that chooses its tokens, wherever they lie, has none.

    Raises:
        UnknownPartError: the encoder has no deformable attention.
    """
    attention = next(iter(find_attentions(encoder).values()), None)
    if attention is None:
        raise UnknownPartError(f"{type(encoder).__name__} has no deformable attention to count")
    # A pyramid of few tokens: encoders treat scales of any size alike.
    sides = [2**level for level in reversed(range(attention.num_levels))]
    weight = attention.output_proj.weight
    masks = [torch.zeros(1, side, side, dtype=torch.bool, device=weight.device) for side in sides]
    scales = Scales.from_masks(masks, padded=False, dtype=weight.dtype)
    tokens = weight.new_zeros(1, scales.num_tokens, len(weight))
    with record_attention(encoder) as maps:
        encoder.eval()(tokens, tokens, scales)
    return [attention_map.query_levels for attention_map in maps]


def count_updates(encoder: nn.Module) -> EncoderUpdates:
    """Count how often an encoder updates each scale.

    Raises:
        UnknownPartError: the encoder has no deformable attention.
    """
    layers = updated_levels(encoder)
    num_levels = next(iter(find_attentions(encoder).values())).num_levels
    return EncoderUpdates(encoder_name(encoder, num_levels), count_layers(layers, num_levels))


def count_layers(layers: Sequence[Sequence[int]], num_levels: int) -> tuple[int, ...]:
    """Return the number of layers that update each scale; see :func:`updated_levels`."""
    return tuple(sum(level in layer for layer in layers) for level in range(num_levels))


def encoder_name(encoder: nn.Module, num_levels: int) -> str:
    """Return an encoder's name in the paper's notation."""
    if isinstance(encoder, InterleavedEncoder):
        low = encoder.num_low_levels
        blocks = len(encoder.low_level_ffns)
        return f"H{num_levels - low}L{low}-({encoder.updates_per_block}+1)x{blocks}"
    if isinstance(encoder, DeformableEncoder):
        return "full encoder"
    return type(encoder).__name__


def make_grids(
    strides: Sequence[int], shapes: Sequence[tuple[int, int]], inputs: dict
) -> list[TokenGrid]:
    """Return the tokens of each scale of an image.

    Args:
        strides: of the scales.
        shapes: ``(height, width)`` of their maps, in cells.
        inputs: the detector's, with the resized image and the size of that to draw on.
    """
    resized = inputs["image"].shape[1:]
    height, width = (inputs[name] / side for name, side in zip(("height", "width"), resized))
    return [
        TokenGrid(stride=stride, shape=tuple(shape), cell=(stride * height, stride * width))
        for stride, shape in zip(strides, shapes)
    ]
