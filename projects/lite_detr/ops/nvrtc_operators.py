"""The operators with kernels that NVRTC compiles, for GPUs that the extension has none for.

They do what ``kernels/cuda/operators.cpp`` and ``run.cpp`` do in the extension.
"""

import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library, infer_schema

from . import nvrtc
from .checks import (
    check_fused_key_aware,
    check_fused_msda,
    check_key_aware,
    check_level_sizes,
    check_msda,
    check_output,
    check_saved,
    level_sizes,
)
from .nvrtc_kernels import (
    VECTOR_BYTES,
    Locations,
    Offsets,
    aligned,
    compute_dtype,
    kernels,
    load,
    make_geometry,
    token_rows,
)
from .sampling import unflatten


class Call:
    """A call of an operator, whose arguments have been checked."""

    def __init__(
        self,
        attention: str,
        value: Tensor,
        points: Locations | Offsets,
        sizes: Sequence[tuple[int, int]],
        points_shape: Sequence[int],
        key: Tensor | None = None,
    ) -> None:
        shared = key is None if attention == "key_aware" else None
        self.channels = value.shape[3]
        self.kernels = kernels(
            attention, isinstance(points, Offsets), value.dtype, self.channels, shared
        )
        self.width = self.kernels[0].head_width
        batch, queries, heads = points_shape[:3]
        self.geometry = make_geometry(
            batch, queries, heads, self.width, points_shape[4], tuple(sizes)
        )
        self.value, self.points, self.key = value, points, key
        self.values, self.keys = self.sampled(value), None if key is None else self.sampled(key)
        self.rows = (batch, queries, heads, self.width)

    def padded(self, tensor: Tensor) -> Tensor:
        """``[..., D]`` -> aligned ``[..., D']`` with the channels of kernels, zeros after the D."""
        missing = self.width - tensor.shape[-1]
        return aligned(F.pad(tensor, (0, missing)) if missing else tensor)

    def padded_heads(self, tensor: Tensor) -> Tensor:
        """``[B, Q, M * D]`` -> aligned ``[B, Q, M, D']``."""
        return self.padded(tensor.unflatten(2, (self.geometry.heads, self.channels)))

    def sampled(self, tensor: Tensor) -> Tensor:
        """Return rows ``[B, S, M, D']``: the tensor if its strides allow, else a padded copy."""
        size, strides = tensor.element_size(), tensor.stride()

        def fits(rows: Tensor) -> bool:
            return rows.shape[1] * (rows.stride(1) * size // VECTOR_BYTES) < 2**31

        as_it_is = (
            tensor.shape[3] == self.width
            and strides[3] == 1
            and strides[1] * size < 2**31
            and fits(tensor)
            and not tensor.data_ptr() % VECTOR_BYTES
            and not any(stride * size % VECTOR_BYTES for stride in strides[:3])
        )
        if as_it_is:
            return tensor
        copy = self.padded(tensor)
        if not fits(copy):
            raise ValueError(
                f"the CUDA kernels take tokens of up to 32 GiB an image, got {copy.shape[1]} "
                f"tokens of {copy.stride(1) * size} bytes. Call the *_pytorch forms of "
                "lite_detr.ops"
            )
        return copy

    def empty(self, *shape: int, exact: bool = False) -> Tensor:
        dtype = compute_dtype(self.value.dtype) if exact else self.value.dtype
        return self.value.new_empty(shape, dtype=dtype)

    def zero_rows(self) -> Tensor:
        """Return zeros ``[B, S, M, D']`` for a kernel to add gradients to."""
        shape = (*self.value.shape[:3], self.width)
        return self.value.new_zeros(shape, dtype=compute_dtype(self.value.dtype))

    def finish_rows(self, sums: Tensor) -> Tensor:
        return sums[..., : self.channels].to(self.value.dtype).contiguous()

    def run(self, way: str, **fields: Tensor | float | None) -> None:
        """Launch the kernel, unless there is nothing to do."""
        geometry = self.geometry
        if not (geometry.batch and geometry.queries and geometry.heads):
            return
        kernel = self.kernels[way == "backward"]
        device = self.value.device
        with torch.cuda.device(device):
            loaded = load(kernel, device.index)
            struct = kernel.argument()
            argument = struct(geometry=geometry, value=token_rows(self.values))
            for name, field in self.points.fields().items():
                setattr(argument.points, name, field)
            if kernel.shared is not None:
                argument.key, argument.scale = token_rows(self.keys), 1 / math.sqrt(self.channels)
            for name, field in fields.items():
                rows = name in ("grad_value", "grad_key")
                pointer = (
                    token_rows(field) if rows else field.data_ptr() if field is not None else 0
                )
                setattr(argument, name, pointer)
            nvrtc.launch(loaded.function, *loaded.grid(geometry), argument, device)

    def forward(self, any_weights: Tensor) -> Tensor:
        """Return the output, given weights, or logits if the points are given by offsets."""
        weights, output = aligned(any_weights), self.empty(*self.rows)
        self.run("forward", weights=weights, output=output)
        return output[..., : self.channels].flatten(2)

    def backward(
        self, grad_output: Tensor, any_weights: Tensor, output: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of the value and of the weights or logits."""
        alert_not_deterministic("ms_deform_attn_backward")
        weights, grads = aligned(any_weights), self.padded_heads(grad_output)
        outputs = None if output is None else self.padded_heads(output)
        grad_value, grad_weights = self.zero_rows(), torch.empty_like(weights)
        self.run(
            "backward",
            weights=weights,
            output=outputs,
            grad_output=grads,
            grad_value=grad_value,
            grad_weights=grad_weights,
        )
        return self.finish_rows(grad_value), grad_weights

    def key_aware_forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        queries, output = self.padded(query), self.empty(*self.rows)
        logsumexp = self.empty(*self.rows[:3], exact=True)
        self.run("forward", query=queries, output=output, logsumexp=logsumexp)
        return output[..., : self.channels].flatten(2), logsumexp

    def key_aware_backward(
        self, grad_output: Tensor, query: Tensor, output: Tensor, logsumexp: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value."""
        alert_not_deterministic("key_aware_ms_deform_attn_backward")
        queries, grads = self.padded(query), self.padded_heads(grad_output)
        outputs, log_sums = self.padded_heads(output), aligned(logsumexp)
        grad_value = self.zero_rows()
        grad_key = None if self.key is None else self.zero_rows()
        grad_query = torch.empty_like(queries)
        self.run(
            "backward",
            query=queries,
            output=outputs,
            logsumexp=log_sums,
            grad_output=grads,
            grad_value=grad_value,
            grad_key=grad_key,
            grad_query=grad_query,
        )
        return (
            grad_query[..., : self.channels].contiguous(),
            self.value.new_empty(0) if grad_key is None else self.finish_rows(grad_key),
            self.finish_rows(grad_value),
        )

    def reference_gradient(self, wanted: bool) -> Tensor:
        """Return the gradient of the reference points; empty if it is not wanted."""
        return self.points.reference_gradient() if wanted else self.points.given.new_empty(0)


def alert_not_deterministic(name: str) -> None:
    """Raise or warn, as users chose, since the order of atomic additions is not fixed."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        f"lite_detr::{name} on CUDA does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


def at_locations(
    attention: str,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    key: Tensor | None = None,
) -> Call:
    sizes = level_sizes(spatial_shapes, level_start_index, value.shape[1])
    points = Locations(sampling_locations, value)
    return Call(attention, value, points, sizes, sampling_locations.shape, key)


def at_offsets(
    attention: str,
    value: Tensor,
    sizes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    key: Tensor | None = None,
) -> Call:
    pairs = unflatten(sizes)
    check_level_sizes(pairs, value.shape[1])
    points = Offsets(reference_points, sampling_offsets, pairs)
    return Call(attention, value, points, pairs, sampling_offsets.shape, key)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    sampling = value, spatial_shapes, level_start_index, sampling_locations
    check_msda(*sampling, attention_weights)
    return at_locations("msda", *sampling).forward(attention_weights)


def ms_deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    sampling = value, spatial_shapes, level_start_index, sampling_locations
    check_msda(*sampling, attention_weights, grad_output)
    call = at_locations("msda", *sampling)
    call.points.add_gradients()
    grad_value, grad_weights = call.backward(grad_output, attention_weights, None)
    return grad_value, call.points.gradient(), grad_weights


def key_aware_ms_deform_attn(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
) -> tuple[Tensor, Tensor]:
    sampling = value, spatial_shapes, level_start_index, sampling_locations
    check_key_aware(query, key, *sampling)
    return at_locations("key_aware", *sampling, key).key_aware_forward(query)


def key_aware_ms_deform_attn_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    output: Tensor,
    logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sampling = value, spatial_shapes, level_start_index, sampling_locations
    check_key_aware(query, key, *sampling)
    check_saved(grad_output, value, sampling_locations, output, logsumexp)
    call = at_locations("key_aware", *sampling, key)
    call.points.add_gradients()
    grads = call.key_aware_backward(grad_output, query, output, logsumexp)
    return *grads, call.points.gradient()


def fused_ms_deform_attn(
    value: Tensor,
    sizes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    sampling = value, sizes, reference_points, sampling_offsets
    check_fused_msda(*sampling, attention_logits)
    return at_offsets("msda", *sampling).forward(attention_logits)


def fused_ms_deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    sizes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    output: Tensor,
    with_references: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sampling = value, sizes, reference_points, sampling_offsets
    check_fused_msda(*sampling, attention_logits)
    for name, tensor in (("grad_output", grad_output), ("output", output)):
        check_output(name, tensor, value, sampling_offsets)
    call = at_offsets("msda", *sampling)
    call.points.add_gradients()
    grad_value, grad_logits = call.backward(grad_output, attention_logits, output)
    grad_references = call.reference_gradient(with_references)
    return grad_value, grad_references, call.points.gradient(), grad_logits


def fused_key_aware_ms_deform_attn(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    sizes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    sampling = value, sizes, reference_points, sampling_offsets
    check_fused_key_aware(query, key, *sampling)
    return at_offsets("key_aware", *sampling, key).key_aware_forward(query)


def fused_key_aware_ms_deform_attn_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    sizes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    with_references: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sampling = value, sizes, reference_points, sampling_offsets
    check_fused_key_aware(query, key, *sampling)
    check_saved(grad_output, value, sampling_offsets, output, logsumexp)
    call = at_offsets("key_aware", *sampling, key)
    call.points.add_gradients()
    grads = call.key_aware_backward(grad_output, query, output, logsumexp)
    return *grads, call.reference_gradient(with_references), call.points.gradient()


OPERATORS = {
    function.__name__: function
    for function in (
        ms_deform_attn,
        ms_deform_attn_backward,
        key_aware_ms_deform_attn,
        key_aware_ms_deform_attn_backward,
        fused_ms_deform_attn,
        fused_ms_deform_attn_backward,
        fused_key_aware_ms_deform_attn,
        fused_key_aware_ms_deform_attn_backward,
    )
}


def register(define: bool) -> Library:
    """Register the operators for CUDA devices, in place of the extension's if it has any.

    Args:
        define: also define them, if no extension has done so.

    Returns:
        What must live as long as the registrations.
    """
    library = Library("lite_detr", "FRAGMENT")
    for name, function in OPERATORS.items():
        if define:
            library.define(name + infer_schema(function, mutates_args=()))
        library.impl(name, function, "CUDA")
    return library
