// First derivatives call the backward operators; second derivatives raise.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "operators.h"

namespace lite_detr {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

class MsDeformAttn : public torch::autograd::Function<MsDeformAttn> {
 public:
  static Variable forward(
      AutogradContext* context, const Variable& value, const Variable& spatial_shapes,
      const Variable& level_start_index, const Variable& sampling_locations,
      const Variable& attention_weights) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->save_for_backward(
        {value, spatial_shapes, level_start_index, sampling_locations, attention_weights});
    return ms_deform_attn(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    auto [grad_value, grad_locations, grad_weights] =
        ms_deform_attn_backward(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4]);
    return {grad_value, Variable(), Variable(), grad_locations, grad_weights};
  }
};

class KeyAwareMsDeformAttn : public torch::autograd::Function<KeyAwareMsDeformAttn> {
 public:
  static variable_list forward(
      AutogradContext* context, const Variable& query, const std::optional<Variable>& key,
      const Variable& value, const Variable& spatial_shapes, const Variable& level_start_index,
      const Variable& sampling_locations) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, logsumexp] = key_aware_ms_deform_attn(
        query, key, value, spatial_shapes, level_start_index, sampling_locations);
    context->save_for_backward(
        {query, key.value_or(Variable()), value, spatial_shapes, level_start_index,
         sampling_locations, output, logsumexp});
    context->mark_non_differentiable({logsumexp});
    return {output, logsumexp};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const std::optional<Variable> key =
        saved[1].defined() ? std::optional<Variable>(saved[1]) : std::nullopt;
    auto [grad_query, grad_key, grad_value, grad_locations] = key_aware_ms_deform_attn_backward(
        grads[0], saved[0], key, saved[2], saved[3], saved[4], saved[5], saved[6], saved[7]);
    return {
        grad_query, key ? grad_key : Variable(), grad_value, Variable(), Variable(),
        grad_locations};
  }
};

[[noreturn]] void refuse_second_derivative() {
  C10_THROW_ERROR(
      NotImplementedError,
      "deformable attention has no second derivative in lite_detr's native operators. Take first "
      "derivatives without create_graph=True, or call the *_pytorch forms of lite_detr.ops");
}

// The backward operators are recorded too, so that their derivative raises instead of being zero.
class MsDeformAttnBackward : public torch::autograd::Function<MsDeformAttnBackward> {
 public:
  static variable_list forward(
      AutogradContext*, const Variable& grad_output, const Variable& value,
      const Variable& spatial_shapes, const Variable& level_start_index,
      const Variable& sampling_locations, const Variable& attention_weights) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [grad_value, grad_locations, grad_weights] = ms_deform_attn_backward(
        grad_output, value, spatial_shapes, level_start_index, sampling_locations,
        attention_weights);
    return {grad_value, grad_locations, grad_weights};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    refuse_second_derivative();
  }
};

class KeyAwareMsDeformAttnBackward
    : public torch::autograd::Function<KeyAwareMsDeformAttnBackward> {
 public:
  static variable_list forward(
      AutogradContext*, const Variable& grad_output, const Variable& query,
      const std::optional<Variable>& key, const Variable& value, const Variable& spatial_shapes,
      const Variable& level_start_index, const Variable& sampling_locations,
      const Variable& output, const Variable& logsumexp) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [grad_query, grad_key, grad_value, grad_locations] = key_aware_ms_deform_attn_backward(
        grad_output, query, key, value, spatial_shapes, level_start_index, sampling_locations,
        output, logsumexp);
    return {grad_query, grad_key, grad_value, grad_locations};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    refuse_second_derivative();
  }
};

Variable ms_deform_attn_autograd(
    const Variable& value, const Variable& spatial_shapes, const Variable& level_start_index,
    const Variable& sampling_locations, const Variable& attention_weights) {
  return MsDeformAttn::apply(
      value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
}

std::tuple<Variable, Variable> key_aware_ms_deform_attn_autograd(
    const Variable& query, const std::optional<Variable>& key, const Variable& value,
    const Variable& spatial_shapes, const Variable& level_start_index,
    const Variable& sampling_locations) {
  const variable_list results = KeyAwareMsDeformAttn::apply(
      query, key, value, spatial_shapes, level_start_index, sampling_locations);
  return {results[0], results[1]};
}

std::tuple<Variable, Variable, Variable> ms_deform_attn_backward_autograd(
    const Variable& grad_output, const Variable& value, const Variable& spatial_shapes,
    const Variable& level_start_index, const Variable& sampling_locations,
    const Variable& attention_weights) {
  const variable_list results = MsDeformAttnBackward::apply(
      grad_output, value, spatial_shapes, level_start_index, sampling_locations,
      attention_weights);
  return {results[0], results[1], results[2]};
}

std::tuple<Variable, Variable, Variable, Variable> key_aware_ms_deform_attn_backward_autograd(
    const Variable& grad_output, const Variable& query, const std::optional<Variable>& key,
    const Variable& value, const Variable& spatial_shapes, const Variable& level_start_index,
    const Variable& sampling_locations, const Variable& output, const Variable& logsumexp) {
  const variable_list results = KeyAwareMsDeformAttnBackward::apply(
      grad_output, query, key, value, spatial_shapes, level_start_index, sampling_locations,
      output, logsumexp);
  return {results[0], results[1], results[2], results[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(lite_detr, Autograd, library) {
  library.impl("ms_deform_attn", ms_deform_attn_autograd);
  library.impl("ms_deform_attn_backward", ms_deform_attn_backward_autograd);
  library.impl("key_aware_ms_deform_attn", key_aware_ms_deform_attn_autograd);
  library.impl("key_aware_ms_deform_attn_backward", key_aware_ms_deform_attn_backward_autograd);
}

}  // namespace lite_detr
