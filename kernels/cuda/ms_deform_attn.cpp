// Deformable attention on CUDA devices.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "run.h"

namespace lite_detr::cuda {

namespace {

at::Tensor ms_deform_attn_cuda(
    const at::Tensor& value, const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  const Geometry geometry = check_msda(
      value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  const at::ScalarType dtype = value.scalar_type();
  const KernelGeometry kernel_geometry = for_kernel(geometry, dtype);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor values = sampled(value, kernel_geometry);
  const at::Tensor locations = aligned(sampling_locations.to(compute_dtype(dtype)));
  const at::Tensor weights = aligned(attention_weights);
  const at::Tensor output = at::empty(
      {geometry.batch, geometry.queries, geometry.heads, kernel_geometry.channels},
      value.options());

  for_storage_type(dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    run(MsdaForward<T>{
        kernel_geometry, token_rows<const T>(values), data<compute_t<T>>(locations),
        data<T>(weights), data<T>(output)});
  });
  return output.narrow(3, 0, geometry.channels).flatten(2);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cuda(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& spatial_shapes,
    const at::Tensor& level_start_index, const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights) {
  // The order of its atomic additions is not fixed.
  at::globalContext().alertNotDeterministic("lite_detr::ms_deform_attn_backward on CUDA");
  const Geometry geometry = check_msda(
      value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  check_output("grad_output", grad_output, geometry, value);
  const at::ScalarType dtype = value.scalar_type();
  const KernelGeometry kernel_geometry = for_kernel(geometry, dtype);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor values = sampled(value, kernel_geometry);
  const at::Tensor locations = aligned(sampling_locations.to(compute_dtype(dtype)));
  const at::Tensor weights = aligned(attention_weights);
  const at::Tensor grads =
      padded(grad_output.unflatten(2, {geometry.heads, geometry.channels}), kernel_geometry);
  const at::Tensor grad_value = zero_rows(geometry, kernel_geometry, value);
  const at::Tensor grad_locations = at::empty(locations.sizes(), locations.options());
  const at::Tensor grad_weights = at::empty(weights.sizes(), weights.options());

  for_storage_type(dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    using A = compute_t<T>;
    run(MsdaBackward<T>{
        kernel_geometry, token_rows<const T>(values), data<A>(locations), data<T>(weights),
        data<T>(grads), token_rows<A>(grad_value), data<A>(grad_locations), data<T>(grad_weights)});
  });
  return {
      finish_rows(grad_value, value), grad_locations.to(sampling_locations.scalar_type()),
      grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(lite_detr, CUDA, library) {
  library.impl("ms_deform_attn", ms_deform_attn_cuda);
  library.impl("ms_deform_attn_backward", ms_deform_attn_backward_cuda);
}

}  // namespace lite_detr::cuda
