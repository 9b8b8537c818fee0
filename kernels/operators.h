// The operators as C++ functions that go through PyTorch's dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace lite_detr {

at::Tensor ms_deform_attn(
    const at::Tensor& value, const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations, const at::Tensor& attention_weights);

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& spatial_shapes,
    const at::Tensor& level_start_index, const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights);

std::tuple<at::Tensor, at::Tensor> key_aware_ms_deform_attn(
    const at::Tensor& query, const std::optional<at::Tensor>& key, const at::Tensor& value,
    const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> key_aware_ms_deform_attn_backward(
    const at::Tensor& grad_output, const at::Tensor& query, const std::optional<at::Tensor>& key,
    const at::Tensor& value, const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations, const at::Tensor& output, const at::Tensor& logsumexp);

}  // namespace lite_detr
