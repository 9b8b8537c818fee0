"""Register the derivatives of the compiled operators, and their shapes for tracers."""

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from .checks import (
    check_fused_key_aware,
    check_fused_msda,
    check_key_aware,
    check_msda,
    check_output,
    check_saved,
)


def register_fakes() -> None:
    """Register the shapes of the results for tracers, and checks of the arguments.

    These functions also run if any tensor is on the meta device: unless they check all devices, a
    call with tensors of several devices returns memory that nothing has written to.
    """

    @register_fake("lite_detr::ms_deform_attn")
    def _(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
        check_msda(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
        return _output(value, sampling_locations)

    @register_fake("lite_detr::ms_deform_attn_backward")
    def _(grad_output, *arguments):
        check_msda(*arguments, grad_output)
        value, _, _, sampling_locations, attention_weights = arguments
        return _like(value), _like(sampling_locations), _like(attention_weights)

    @register_fake("lite_detr::key_aware_ms_deform_attn")
    def _(*arguments):
        check_key_aware(*arguments)
        return _output_and_logsumexp(value=arguments[2], points=arguments[5])

    @register_fake("lite_detr::key_aware_ms_deform_attn_backward")
    def _(grad_output, *arguments):
        *arguments, output, logsumexp = arguments
        check_key_aware(*arguments)
        query, key, value, _, _, sampling_locations = arguments
        check_saved(grad_output, value, sampling_locations, output, logsumexp)
        return _like(query), _like_key(key, value), _like(value), _like(sampling_locations)

    @register_fake("lite_detr::fused_ms_deform_attn")
    def _(*arguments):
        check_fused_msda(*arguments)
        return _output(value=arguments[0], points=arguments[3])

    @register_fake("lite_detr::fused_ms_deform_attn_backward")
    def _(grad_output, *arguments):
        *arguments, output, with_references = arguments
        check_fused_msda(*arguments)
        value, _, reference_points, sampling_offsets, attention_logits = arguments
        check_output("grad_output", grad_output, value, sampling_offsets)
        check_output("output", output, value, sampling_offsets)
        return (
            _like(value),
            _like_references(reference_points, with_references),
            _like(sampling_offsets),
            _like(attention_logits),
        )

    @register_fake("lite_detr::fused_key_aware_ms_deform_attn")
    def _(*arguments):
        check_fused_key_aware(*arguments)
        return _output_and_logsumexp(value=arguments[2], points=arguments[5])

    @register_fake("lite_detr::fused_key_aware_ms_deform_attn_backward")
    def _(grad_output, *arguments):
        *arguments, output, logsumexp, with_references = arguments
        check_fused_key_aware(*arguments)
        query, key, value, _, reference_points, sampling_offsets = arguments
        check_saved(grad_output, value, sampling_offsets, output, logsumexp)
        return (
            _like(query),
            _like_key(key, value),
            _like(value),
            _like_references(reference_points, with_references),
            _like(sampling_offsets),
        )


def _output(value: Tensor, points: Tensor) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, points.shape[1], heads * channels)


def _output_and_logsumexp(value: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    return _output(value, points), value.new_empty(points.shape[:3], dtype=exact)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _like_key(key: Tensor | None, value: Tensor) -> Tensor:
    return value.new_empty(0) if key is None else _like(key)


def _like_references(reference_points: Tensor, with_references: bool) -> Tensor:
    return _like(reference_points) if with_references else reference_points.new_empty(0)


def register_derivatives() -> None:
    """Let first derivatives call the backward operators, and second ones raise."""
    operators = torch.ops.lite_detr

    def msda_setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def msda_backward(ctx, grad_output):
        grad_value, grad_locations, grad_weights = operators.ms_deform_attn_backward(
            grad_output, *ctx.saved_tensors
        )
        return grad_value, None, None, grad_locations, grad_weights

    def key_aware_setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    def key_aware_backward(ctx, grad_output, _):
        grad_query, grad_key, grad_value, grad_locations = (
            operators.key_aware_ms_deform_attn_backward(grad_output, *ctx.saved_tensors)
        )
        grad_key = None if ctx.saved_tensors[1] is None else grad_key
        return grad_query, grad_key, grad_value, None, None, grad_locations

    def fused_msda_setup(ctx, inputs, output):
        value, ctx.sizes, *others = inputs
        ctx.save_for_backward(value, *others, output)

    def fused_msda_backward(ctx, grad_output):
        value, *others = ctx.saved_tensors
        moves = ctx.needs_input_grad[2]
        grad_value, grad_references, *grads = operators.fused_ms_deform_attn_backward(
            grad_output, value, ctx.sizes, *others, moves
        )
        return grad_value, None, grad_references if moves else None, *grads

    def fused_key_aware_setup(ctx, inputs, output):
        *tensors, ctx.sizes, reference_points, sampling_offsets = inputs
        ctx.save_for_backward(*tensors, reference_points, sampling_offsets, *output)
        ctx.mark_non_differentiable(output[1])

    def fused_key_aware_backward(ctx, grad_output, _):
        query, key, value, *others = ctx.saved_tensors
        moves = ctx.needs_input_grad[4]
        grad_query, grad_key, grad_value, grad_references, grad_offsets = (
            operators.fused_key_aware_ms_deform_attn_backward(
                grad_output, query, key, value, ctx.sizes, *others, moves
            )
        )
        return (
            grad_query,
            None if key is None else grad_key,
            grad_value,
            None,
            grad_references if moves else None,
            grad_offsets,
        )

    for name, backward, setup_context in (
        ("ms_deform_attn", msda_backward, msda_setup),
        ("key_aware_ms_deform_attn", key_aware_backward, key_aware_setup),
        ("fused_ms_deform_attn", fused_msda_backward, fused_msda_setup),
        ("fused_key_aware_ms_deform_attn", fused_key_aware_backward, fused_key_aware_setup),
    ):
        register_autograd(f"lite_detr::{name}", backward, setup_context=setup_context)
        # The backward operators are recorded too, so that their derivative raises instead of being
        # zero.
        register_autograd(f"lite_detr::{name}_backward", refuse_second_derivative)


def refuse_second_derivative(ctx, *grads):
    raise NotImplementedError(
        "deformable attention has no second derivative in lite_detr's native operators. Take first "
        "derivatives without create_graph=True, or call the *_pytorch forms of lite_detr.ops"
    )
