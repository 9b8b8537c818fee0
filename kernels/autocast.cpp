// Under autocast, tensors with channels take the low precision. Locations become float32: 16 bits
// cannot tell neighbouring cells of a wide map apart.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "operators.h"

namespace lite_detr {

namespace {

using at::autocast::cached_cast;

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor ms_deform_attn_autocast(
    const at::Tensor& value, const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  c10::impl::ExcludeDispatchKeyGuard without_autocast(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return ms_deform_attn(
      cached_cast(dtype, value, device), spatial_shapes, level_start_index,
      cached_cast(at::kFloat, sampling_locations, device),
      cached_cast(dtype, attention_weights, device));
}

template <c10::DeviceType device, c10::DispatchKey dispatch_key>
std::tuple<at::Tensor, at::Tensor> key_aware_ms_deform_attn_autocast(
    const at::Tensor& query, const std::optional<at::Tensor>& key, const at::Tensor& value,
    const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations) {
  c10::impl::ExcludeDispatchKeyGuard without_autocast(dispatch_key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return key_aware_ms_deform_attn(
      cached_cast(dtype, query, device), cached_cast(dtype, key, device),
      cached_cast(dtype, value, device), spatial_shapes, level_start_index,
      cached_cast(at::kFloat, sampling_locations, device));
}

}  // namespace

TORCH_LIBRARY_IMPL(lite_detr, AutocastCPU, library) {
  constexpr auto device = c10::DeviceType::CPU;
  constexpr auto key = c10::DispatchKey::AutocastCPU;
  library.impl("ms_deform_attn", ms_deform_attn_autocast<device, key>);
  library.impl("key_aware_ms_deform_attn", key_aware_ms_deform_attn_autocast<device, key>);
}

TORCH_LIBRARY_IMPL(lite_detr, AutocastCUDA, library) {
  constexpr auto device = c10::DeviceType::CUDA;
  constexpr auto key = c10::DispatchKey::AutocastCUDA;
  library.impl("ms_deform_attn", ms_deform_attn_autocast<device, key>);
  library.impl("key_aware_ms_deform_attn", key_aware_ms_deform_attn_autocast<device, key>);
}

}  // namespace lite_detr
