#include "operators.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace lite_detr {

namespace {

template <typename Function>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace

at::Tensor ms_deform_attn(
    const at::Tensor& value, const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  static const auto op = find<decltype(ms_deform_attn)>("lite_detr::ms_deform_attn");
  return op.call(
      value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& spatial_shapes,
    const at::Tensor& level_start_index, const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights) {
  static const auto op =
      find<decltype(ms_deform_attn_backward)>("lite_detr::ms_deform_attn_backward");
  return op.call(
      grad_output, value, spatial_shapes, level_start_index, sampling_locations,
      attention_weights);
}

std::tuple<at::Tensor, at::Tensor> key_aware_ms_deform_attn(
    const at::Tensor& query, const std::optional<at::Tensor>& key, const at::Tensor& value,
    const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations) {
  static const auto op =
      find<decltype(key_aware_ms_deform_attn)>("lite_detr::key_aware_ms_deform_attn");
  return op.call(query, key, value, spatial_shapes, level_start_index, sampling_locations);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> key_aware_ms_deform_attn_backward(
    const at::Tensor& grad_output, const at::Tensor& query, const std::optional<at::Tensor>& key,
    const at::Tensor& value, const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations, const at::Tensor& output, const at::Tensor& logsumexp) {
  static const auto op = find<decltype(key_aware_ms_deform_attn_backward)>(
      "lite_detr::key_aware_ms_deform_attn_backward");
  return op.call(
      grad_output, query, key, value, spatial_shapes, level_start_index, sampling_locations,
      output, logsumexp);
}

}  // namespace lite_detr
