// Deformable attention on the CPU.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "run.h"

namespace lite_detr::cpu {

namespace {

at::Tensor ms_deform_attn_cpu(
    const at::Tensor& value, const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  const Geometry geometry = check_msda(
      value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  const at::Tensor weights = attention_weights.contiguous();
  const at::Tensor locations =
      sampling_locations.to(compute_dtype(value.scalar_type())).contiguous();
  const at::Tensor output = at::empty(
      {geometry.batch, geometry.queries, geometry.heads, padded_channels(geometry.channels)},
      value.options());

  for_storage_type(value.scalar_type(), [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    const MsdaForward<T> tensors{
        data<compute_t<T>>(locations), data<T>(weights), data<T>(output)};
    run_forward<T>(
        geometry, Source<T>(value), Source<T>(), kernels_for<T>().msda_forward, tensors);
  });
  return output.narrow(3, 0, geometry.channels).flatten(2);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& spatial_shapes,
    const at::Tensor& level_start_index, const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights) {
  const Geometry geometry = check_msda(
      value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  check_output("grad_output", grad_output, geometry, value);
  const at::ScalarType dtype = value.scalar_type();
  const at::Tensor grads =
      pad_channels(grad_output.unflatten(2, {geometry.heads, geometry.channels}), kChannelMultiple);
  const at::Tensor weights = attention_weights.contiguous();
  const at::Tensor locations = sampling_locations.to(compute_dtype(dtype)).contiguous();
  const at::Tensor grad_value = at::empty(value.sizes(), value.options());
  const at::Tensor grad_locations = at::empty(locations.sizes(), locations.options());
  const at::Tensor grad_weights = at::empty(weights.sizes(), weights.options());

  for_storage_type(dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    using A = compute_t<T>;
    const MsdaBackward<T> tensors{
        data<A>(locations), data<T>(weights), data<T>(grads), data<A>(grad_locations),
        data<T>(grad_weights)};
    run_backward<T>(
        geometry, Source<T>(value), Source<T>(), data<T>(grad_value), nullptr,
        kernels_for<T>().msda_backward, tensors);
  });
  return {grad_value, grad_locations.to(sampling_locations.scalar_type()), grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(lite_detr, CPU, library) {
  library.impl("ms_deform_attn", ms_deform_attn_cpu);
  library.impl("ms_deform_attn_backward", ms_deform_attn_backward_cpu);
}

}  // namespace lite_detr::cpu
