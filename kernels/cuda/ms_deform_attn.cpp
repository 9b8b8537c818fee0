// Deformable attention on CUDA devices.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>

#include "operators.h"
#include "tensors.h"

namespace lite_detr::cuda {

at::Tensor ms_deform_attn(
    const at::Tensor& value, const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  const Problem problem = check_plain(
      value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  const at::ScalarType dtype = value.scalar_type();
  const Geometry sizes = geometry(problem, dtype);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor values = sampled(value, sizes);
  const at::Tensor locations = aligned(sampling_locations.to(compute_dtype(dtype)));
  const at::Tensor weights = aligned(attention_weights);
  const at::Tensor output =
      at::empty({problem.batch, problem.queries, problem.heads, sizes.channels}, value.options());

  for_storage_type(dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    run(PlainForward<T>{
        sizes, rows<const T>(values), data<compute_t<T>>(locations), data<T>(weights),
        data<T>(output)});
  });
  return output.narrow(3, 0, problem.channels).flatten(2);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& spatial_shapes,
    const at::Tensor& level_start_index, const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights) {
  // Its atomic additions come in any order.
  at::globalContext().alertNotDeterministic("lite_detr::ms_deform_attn_backward on CUDA");
  const Problem problem = check_plain(
      value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  check_output("grad_output", grad_output, problem, value);
  const at::ScalarType dtype = value.scalar_type();
  const Geometry sizes = geometry(problem, dtype);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor values = sampled(value, sizes);
  const at::Tensor locations = aligned(sampling_locations.to(compute_dtype(dtype)));
  const at::Tensor weights = aligned(attention_weights);
  const at::Tensor grads =
      padded(grad_output.unflatten(2, {problem.heads, problem.channels}), sizes);
  const at::Tensor grad_value = zero_rows(problem, sizes, value);
  const at::Tensor grad_locations = at::empty(locations.sizes(), locations.options());
  const at::Tensor grad_weights = at::empty(weights.sizes(), weights.options());

  for_storage_type(dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    using A = compute_t<T>;
    run(PlainBackward<T>{
        sizes, rows<const T>(values), data<A>(locations), data<T>(weights), data<T>(grads),
        rows<A>(grad_value), data<A>(grad_locations), data<T>(grad_weights)});
  });
  return {
      finish_rows(grad_value, value), grad_locations.to(sampling_locations.scalar_type()),
      grad_weights};
}

}  // namespace lite_detr::cuda
