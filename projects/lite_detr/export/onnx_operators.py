"""The sampling operators in standard ONNX operators, for translating an exported program.

Each function has the arguments of the operator of its name and adds nodes of opset 18 to the graph
under construction. Batch, queries and the sizes of the levels may be open; the numbers of heads,
levels, points and channels are known.

Operators are chosen so that tools that convert ONNX files take them: version converters know no
earlier ``Split`` or ``Pad``, and ONNX Runtime's symbolic shape inference, with which it prepares
quantisation, loses track of a ``Reshape`` to -1 and of reductions of opset 18 but ``ReduceSum``.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from onnx import TensorProto
from onnxscript import opset18 as op

from ..errors import ExportError

INT64 = TensorProto.INT64


def ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    """See :func:`lite_detr.ops.ms_deform_attn`."""
    levels, points = sampling_locations.shape[3:5]
    queries = op.Shape(sampling_locations, start=1, end=2)
    weights = op.Transpose(attention_weights, perm=[3, 0, 2, 4, 1])  # [L, B, M, P, Q]
    shape = op.Concat(maps_of(value), ints(1, points), queries, axis=0)
    samples = sample_levels(value, spatial_shapes, level_start_index, sampling_locations)
    output = None
    for level in range(levels):
        level_weights = op.Reshape(op.Gather(weights, ints(level), axis=0), shape)
        output = add(output, weighted_sum(samples[level], level_weights))
    return merge_heads(output, value)


def key_aware_ms_deform_attn(
    query, key, value, spatial_shapes, level_start_index, sampling_locations
):
    """See :func:`lite_detr.ops.key_aware_ms_deform_attn`; a key of None is the value.

    A location outside a map samples zeros, as GridSample does.
    """
    heads, channels = value.shape[2:]
    levels, points = sampling_locations.shape[3:5]
    values = sample_levels(value, spatial_shapes, level_start_index, sampling_locations)
    keys = values
    if key is not None:
        keys = sample_levels(key, spatial_shapes, level_start_index, sampling_locations)
    queries = op.Shape(query, start=1, end=2)
    # [B, Q, M, D] -> [B * M, D, 1, Q]
    query = op.Transpose(query, perm=[0, 2, 3, 1])
    query = op.Reshape(query, op.Concat(maps_of(value), ints(channels, 1), queries, axis=0))
    query = op.Mul(query, op.Constant(value_float=channels**-0.5))
    logits = op.Concat(
        *(op.ReduceSum(op.Mul(query, key), ints(1), keepdims=0) for key in keys), axis=1
    )  # [B * M, L * P, Q]
    weights = op.Unsqueeze(op.Softmax(logits, axis=1), ints(1))
    output = None
    for level in range(levels):
        start, end = ints(level * points), ints((level + 1) * points)
        level_weights = op.Slice(weights, start, end, ints(2))
        output = add(output, weighted_sum(values[level], level_weights))
    logsumexp = op.ReduceLogSumExp(logits, ints(1), keepdims=0)
    logsumexp = op.Reshape(logsumexp, op.Concat(batch_of(value), ints(heads), queries, axis=0))
    return merge_heads(output, value), op.Transpose(logsumexp, perm=[0, 2, 1])


def fused_ms_deform_attn(value, sizes, reference_points, sampling_offsets, attention_logits):
    """See :func:`lite_detr.ops.fused_ms_deform_attn`; ``sizes`` are flat, integers or values."""
    heads, levels, points = sampling_offsets.shape[2:5]
    logits = op.Reshape(attention_logits, ints(0, 0, heads, levels * points))
    weights = op.Reshape(op.Softmax(logits, axis=-1), ints(0, 0, heads, levels, points))
    places = locate_points(sizes, reference_points, sampling_offsets)
    return ms_deform_attn(value, *places, weights)


def fused_key_aware_ms_deform_attn(query, key, value, sizes, reference_points, sampling_offsets):
    """See :func:`lite_detr.ops.fused_key_aware_ms_deform_attn`; a key of None is the value."""
    places = locate_points(sizes, reference_points, sampling_offsets)
    return key_aware_ms_deform_attn(query, key, value, *places)


def translations() -> dict[torch._ops.OpOverload, Callable]:
    """Return the ``custom_translation_table`` for ``torch.onnx.export``."""
    operators, aten = torch.ops.lite_detr, torch.ops.aten
    return {
        operators.ms_deform_attn.default: ms_deform_attn,
        operators.key_aware_ms_deform_attn.default: key_aware_ms_deform_attn,
        operators.fused_ms_deform_attn.default: fused_ms_deform_attn,
        operators.fused_key_aware_ms_deform_attn.default: fused_key_aware_ms_deform_attn,
        aten.all.dim: all_of,
        aten.amax.default: largest,
        aten.pad.default: pad,
        aten.prod.dim_int: product,
        aten.split.Tensor: split,
    }


def all_of(x, dim: int, keepdim: bool = False):
    """``x.all(dim, keepdim)`` of booleans."""
    wrong = op.ReduceSum(op.Cast(op.Not(x), to=INT64), ints(dim), keepdims=int(keepdim))
    return op.Equal(wrong, op.Constant(value_int=0))


def largest(x, dim: Sequence[int] = (), keepdim: bool = False):
    """``x.amax(dim, keepdim)``, over the last dimension of three by pooling."""
    if len(x.shape) != 3 or tuple(dim) not in ((-1,), (2,)):
        return op.ReduceMax(x, ints(*dim), keepdims=int(keepdim))
    pooled = op.GlobalMaxPool(op.Unsqueeze(x, ints(3)))  # [B, S, 1, 1]
    return op.Squeeze(pooled, ints(3) if keepdim else ints(2, 3))


def pad(x, padding, mode: str = "constant", value: float = 0.0):
    """``torch.nn.functional.pad`` with a constant, by concatenation.

    Args:
        x: the tensor.
        padding: cells before and after, for the last axis and then for those before it; integers,
            or a tensor with as many.
        mode: ``constant``, the only one that detectors use.
        value: the constant.
    """
    if mode != "constant":
        raise ExportError(f"padding in the mode {mode} has no translation to ONNX")
    if isinstance(padding, Sequence):
        sizes = [
            (ints(n) if n else None) if isinstance(n, int) else op.Reshape(n, ints(1))
            for n in padding
        ]
    else:
        sizes = [op.Slice(padding, ints(i), ints(i + 1)) for i in range(padding.shape[0])]
    constant, rank = op.Constant(value_float=value), len(x.shape)
    for axis, before, after in zip(reversed(range(rank)), sizes[::2], sizes[1::2]):
        outer, inner = op.Shape(x, start=0, end=axis), op.Shape(x, start=axis + 1)
        first, last = (
            [op.Expand(constant, op.Concat(outer, size, inner, axis=0))] if size is not None else []
            for size in (before, after)
        )
        if first or last:
            x = op.Concat(*first, x, *last, axis=axis)
    return x


def product(x, dim: int, keepdim: bool = False, dtype: int = -1):
    """``x.prod(dim, keepdim)``, one factor after the other."""
    indices = [
        ints(index) if keepdim else op.Constant(value_int=index) for index in range(x.shape[dim])
    ]
    return functools.reduce(op.Mul, [op.Gather(x, index, axis=dim) for index in indices])


def split(x, split_size: int, dim: int = 0) -> list:
    """``x.split(split_size, dim)``, by slices."""
    return [
        op.Slice(x, ints(start), ints(start + split_size), ints(dim))
        for start in range(0, x.shape[dim], split_size)
    ]


def locate_points(sizes, reference_points, sampling_offsets) -> tuple:
    """Return ``spatial_shapes``, ``level_start_index`` and ``sampling_locations``.

    Args:
        sizes: heights and widths of the levels in turn, integers or values.
        reference_points: ``[B, Q, L, 2]`` points or ``[B, Q, L, 4]`` boxes.
        sampling_offsets: ``[B, Q, M, L, P, 2]``
    """
    levels, points = sampling_offsets.shape[3:5]
    sides = [ints(n) if isinstance(n, int) else op.Reshape(n, ints(1)) for n in sizes]
    starts = [ints(0)]
    for height, width in zip(sides[:-2:2], sides[1:-2:2]):
        starts.append(op.Add(starts[-1], op.Mul(height, width)))
    spatial_shapes = op.Reshape(op.Concat(*sides, axis=0), ints(levels, 2))
    if reference_points.shape[3] == 2:
        extents = op.Concat(*(sides[i ^ 1] for i in range(2 * levels)), axis=0)
        extents = op.Reshape(op.Cast(extents, to=TensorProto.FLOAT), ints(1, 1, 1, levels, 1, 2))
        steps, centres = op.Reciprocal(extents), reference_points
    else:
        centres, half = (
            op.Slice(reference_points, ints(start), ints(start + 2), ints(3)) for start in (0, 2)
        )
        steps = op.Mul(op.Unsqueeze(half, ints(2, 4)), op.Constant(value_float=0.5 / points))
    moves = op.Mul(sampling_offsets, steps)
    locations = op.Add(op.Unsqueeze(centres, ints(2, 4)), moves)
    locations.shape, locations.dtype = sampling_offsets.shape, sampling_offsets.dtype
    return spatial_shapes, op.Concat(*starts, axis=0), locations


def sample_levels(tokens, spatial_shapes, level_start_index, sampling_locations) -> list:
    """Return for each level ``[B * M, D, P, Q]``, sampled bilinearly, with zeros outside the map.

    Queries come last, as runtimes are slow to sum along an inner dimension of four points.

    Args:
        tokens: ``[B, S, M, D]``
        spatial_shapes: ``[L, 2]``, height and width of each level.
        level_start_index: ``[L]``, the token at which each level starts.
        sampling_locations: ``[B, Q, M, L, P, 2]``, (x, y) in 0 to 1.
    """
    channels, (levels, points) = tokens.shape[3], sampling_locations.shape[3:5]
    queries = op.Shape(sampling_locations, start=1, end=2)
    maps = maps_of(tokens)
    grid_shape = op.Concat(maps, ints(points), queries, ints(2), axis=0)
    sample_shape = op.Concat(maps, ints(channels, points), queries, axis=0)
    tokens = op.Transpose(tokens, perm=[0, 2, 3, 1])  # [B, M, D, S]
    # GridSample's locations run from -1 to 1.
    grids = op.Sub(
        op.Mul(
            op.Transpose(sampling_locations, perm=[3, 0, 2, 4, 1, 5]),  # [L, B, M, P, Q, 2]
            op.Constant(value_float=2.0),
        ),
        op.Constant(value_float=1.0),
    )
    samples = []
    for level in range(levels):
        size = op.Reshape(op.Gather(spatial_shapes, ints(level), axis=0), ints(2))
        start = op.Gather(level_start_index, ints(level), axis=0)
        cells = op.Mul(op.Gather(size, ints(0)), op.Gather(size, ints(1)))
        end = op.Add(start, cells)
        level_tokens = op.Slice(tokens, start, end, ints(3))
        feature_map = op.Reshape(level_tokens, op.Concat(maps, ints(channels), size, axis=0))
        grid = op.Reshape(op.Gather(grids, ints(level), axis=0), grid_shape)
        sampled = op.GridSample(
            feature_map, grid, mode="bilinear", padding_mode="zeros", align_corners=0
        )
        # This changes nothing, but says what the shape is: that of the map depends on values.
        samples.append(op.Reshape(sampled, sample_shape))
    return samples


def weighted_sum(samples, weights):
    """``[B * M, D, P, Q]`` and ``[B * M, 1, P, Q]`` -> ``[B * M, D, Q]``"""
    return op.ReduceSum(op.Mul(samples, weights), ints(2), keepdims=0)


def merge_heads(output, value):
    """``[B * M, D, Q]`` -> ``[B, Q, M * D]``, with the heads of ``value [B, S, M, D]``."""
    heads, channels = value.shape[2:]
    queries = op.Shape(output, start=2, end=3)
    shape = op.Concat(batch_of(value), ints(heads * channels), queries, axis=0)
    return op.Transpose(op.Reshape(output, shape), perm=[0, 2, 1])


def batch_of(tokens):
    """Return ``[B]`` of tokens ``[B, S, M, D]``."""
    return op.Shape(tokens, start=0, end=1)


def maps_of(tokens):
    """Return ``[B * M]`` of tokens ``[B, S, M, D]``: each head samples a map of its own."""
    return op.Mul(batch_of(tokens), ints(tokens.shape[2]))


def add(total, term):
    return term if total is None else op.Add(total, term)


def ints(*values: int):
    """Return a constant ``[N]`` int64."""
    return op.Constant(value_ints=list(values))
