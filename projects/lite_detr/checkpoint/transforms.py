"""Convert what the name of a weight alone does not tell: splits, joins, and counts of layers.

Each function takes and returns weights under the names of the rules in ``sources.py``, brings one
group of them to our names, and leaves all others as they are.
"""

import functools
import re
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import WeightsError

LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.")
HEAD = re.compile(r"decoder\.heads\.(class_embed|bbox_embed)\.(\d+)\.(.+)")
PROJECTION = re.compile(r"(.+\.self_attn)\.[qkv]_proj\.(weight|bias)")
NECK = re.compile(r"neck\.convs\.(\d+)\.(.+)")
LOW_LEVEL_FFN = re.compile(r"encoder\.layers\.(\d+)\.low_level_ffn\.(.+)")


class Weight(NamedTuple):
    """A weight, and the keys of the file that it came from.

    Attributes:
        value: the weight.
        keys: names in the file; none if the source's code computes as if there were this weight.
        reason: why there are none.
    """

    value: Tensor
    keys: tuple[str, ...]
    reason: str = ""


Weights = dict[str, Weight]


def add(weights: Weights, name: str, weight: Weight) -> None:
    """Add a weight; if it is there already, both must be equal.

    Raises:
        WeightsError: two keys stand for one weight and differ.
    """
    known = weights.get(name)
    if known is None:
        weights[name] = weight
        return
    if not torch.equal(known.value, weight.value):
        raise WeightsError(
            f"weights hold {known.keys[0]} and {weight.keys[0]}, which are one parameter "
            f"({name}), with different values: the file is broken, or of another model"
        )
    weights[name] = Weight(known.value, known.keys + weight.keys)


def num_layers(weights: Weights, part: str) -> int:
    """Return the number of layers of the encoder or decoder."""
    matches = (LAYER.match(name) for name in weights)
    return 1 + max((int(m[2]) for m in matches if m and m[1] == part), default=-1)


def join_projections(weights: Weights) -> Weights:
    """Join query, key and value projections to the ``in_proj`` of ``nn.MultiheadAttention``."""
    joined: Weights = {}
    for name, weight in weights.items():
        match = PROJECTION.fullmatch(name)
        if match is None:
            joined[name] = weight
            continue
        ours = f"{match[1]}.in_proj_{match[2]}"
        parts = [weights.get(f"{match[1]}.{part}_proj.{match[2]}") for part in "qkv"]
        if ours in joined or None in parts:
            # One that lacks the others keeps its name, and is reported as left over.
            if None in parts:
                joined[name] = weight
            continue
        value = torch.cat([part.value for part in parts])
        joined[ours] = Weight(value, tuple(key for part in parts for key in part.keys))
    return joined


def split_queries(weights: Weights) -> Weights:
    """Split Deformable DETR's query embedding into position and content; H-DETR's is content."""
    weights = dict(weights)
    embed = weights.pop("queries.embed.weight", None)
    if embed is None:
        return weights
    if any(name.startswith("queries.encode_box.") for name in weights):
        return weights | {"queries.content.weight": embed}
    pos, content = embed.value.chunk(2, dim=1)
    return weights | {
        "queries.pos.weight": Weight(pos.contiguous(), embed.keys),
        "queries.content.weight": Weight(content.contiguous(), embed.keys),
    }


def split_convs(weights: Weights) -> Weights:
    """Split the neck's convolutions into those on the backbone's maps, 1x1, and of added scales."""
    kernels = {
        int(match[1]): weight.value.shape[-1]
        for name, weight in weights.items()
        if (match := NECK.fullmatch(name)) and weight.value.dim() == 4
    }
    maps = sum(kernel == 1 for kernel in kernels.values())
    split = {}
    for name, weight in weights.items():
        if match := NECK.fullmatch(name):
            index = int(match[1])
            kind = f"lateral_convs.{index}" if index < maps else f"extra_convs.{index - maps}"
            name = f"neck.{kind}.{match[2]}"
        split[name] = weight
    return split


def number_blocks(weights: Weights) -> Weights:
    """Move the light feed-forward network from the last layer of a block, as in Lite-DINO, to it.

    Raises:
        WeightsError: the layers that have one do not divide the encoder into equal blocks.
    """
    layers = sorted({int(m[1]) for name in weights if (m := LOW_LEVEL_FFN.fullmatch(name))})
    if not layers:
        return weights
    total = num_layers(weights, "encoder")
    updates, rest = divmod(total, len(layers))
    if rest or layers != [updates * (block + 1) - 1 for block in range(len(layers))]:
        raise WeightsError(
            f"weights hold feed-forward networks for low-level scales in the encoder's layers "
            f"{layers} of {total}; accepted is the last layer of each of several equal blocks, "
            "such as [1, 3, 5] of 6"
        )
    numbered = {}
    for name, weight in weights.items():
        if match := LOW_LEVEL_FFN.fullmatch(name):
            name = f"encoder.low_level_ffns.{layers.index(int(match[1]))}.{match[2]}"
        numbered[name] = weight
    return numbered


def split_heads(weights: Weights, separate: bool = False) -> Weights:
    """Find the heads that make proposals, and those that all layers share.

    Two-stage models have one more pair of heads than layers, for the proposals. Deformable DETR
    without refinement and DINO list the same pair of heads for every layer.

    Args:
        weights: all weights.
        separate: each layer has its own heads, even if they are equal.
    """
    layers = num_layers(weights, "decoder")
    split: Weights = {}
    heads: dict[int, Weights] = {}
    for name, weight in weights.items():
        match = HEAD.fullmatch(name)
        if match is None:
            split[name] = weight
        elif int(match[2]) == layers:
            split[f"queries.{match[1]}.{match[3]}"] = weight
        else:
            heads.setdefault(int(match[2]), {})[f"{match[1]}.{match[3]}"] = weight
    may_share = not separate and len(heads) > 1 and may_share_heads(weights)
    shared = may_share and all_equal(list(heads.values()))
    for index in sorted(heads):
        for rest, weight in heads[index].items():
            kind, leaf = rest.split(".", 1)
            add(split, f"decoder.heads.{kind}.{0 if shared else index}.{leaf}", weight)
    return split


def may_share_heads(weights: Weights) -> bool:
    """Tell whether equal heads are one: not if a decoder that refines was given its own heads."""
    if any(name.startswith("decoder.query_pos.") for name in weights):
        return True
    return not any(
        re.match(r"(transformer|model)\.decoder\.bbox_embed", key)
        for weight in weights.values()
        for key in weight.keys
    )


def all_equal(heads: list[Weights]) -> bool:
    first, *others = heads
    return all(
        head.keys() == first.keys()
        and all(torch.equal(head[name].value, first[name].value) for name in head)
        for head in others
    )


def share_projection(weights: Weights) -> Weights:
    """Give Sparse DETR's scores the projection of its proposals, which is one parameter."""
    if not any(name.startswith("encoder.scorer.") for name in weights):
        return weights
    shared = {
        name.replace("queries.", "encoder.scorer."): weight
        for name, weight in weights.items()
        if name.startswith("queries.enc_output")
    }
    return weights | shared


TRANSFORMS = (
    join_projections,
    split_queries,
    split_convs,
    number_blocks,
    split_heads,
    share_projection,
)
# The same for detectors whose code copies the heads for every layer.
SEPARATE_HEADS = tuple(
    functools.partial(split_heads, separate=True) if transform is split_heads else transform
    for transform in TRANSFORMS
)
