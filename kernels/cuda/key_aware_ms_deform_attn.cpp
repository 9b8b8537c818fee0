// Key-aware deformable attention on CUDA devices.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "run.h"

namespace lite_detr::cuda {

namespace {

std::tuple<at::Tensor, at::Tensor> key_aware_ms_deform_attn_cuda(
    const at::Tensor& query, const std::optional<at::Tensor>& key, const at::Tensor& value,
    const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations) {
  const Geometry geometry =
      check_key_aware(query, key, value, spatial_shapes, level_start_index, sampling_locations);
  const at::ScalarType dtype = value.scalar_type();
  const KernelGeometry kernel_geometry = for_kernel(geometry, dtype);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor values = sampled(value, kernel_geometry);
  const at::Tensor keys = key ? sampled(*key, kernel_geometry) : at::Tensor();
  const at::Tensor queries = padded(query, kernel_geometry);
  const at::Tensor locations = aligned(sampling_locations.to(compute_dtype(dtype)));
  const at::Tensor output = at::empty(queries.sizes(), value.options());
  const at::Tensor logsumexp =
      at::empty({geometry.batch, geometry.queries, geometry.heads}, locations.options());

  for_storage_type(dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    using A = compute_t<T>;
    run(KeyAwareForward<T>{
        kernel_geometry, token_rows<const T>(values),
        key ? token_rows<const T>(keys) : TokenRows<const T>{},
        data<T>(queries), data<A>(locations), A(logit_scale(geometry)), data<T>(output),
        data<A>(logsumexp)});
  });
  return {output.narrow(3, 0, geometry.channels).flatten(2), logsumexp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> key_aware_ms_deform_attn_backward_cuda(
    const at::Tensor& grad_output, const at::Tensor& query, const std::optional<at::Tensor>& key,
    const at::Tensor& value, const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations, const at::Tensor& output, const at::Tensor& logsumexp) {
  // The order of its atomic additions is not fixed.
  at::globalContext().alertNotDeterministic(
      "lite_detr::key_aware_ms_deform_attn_backward on CUDA");
  const Geometry geometry =
      check_key_aware(query, key, value, spatial_shapes, level_start_index, sampling_locations);
  check_output("grad_output", grad_output, geometry, value);
  check_output("output", output, geometry, value);
  const at::ScalarType dtype = value.scalar_type();
  const KernelGeometry kernel_geometry = for_kernel(geometry, dtype);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor locations = aligned(sampling_locations.to(compute_dtype(dtype)));
  check_like(
      "logsumexp", logsumexp, {geometry.batch, geometry.queries, geometry.heads}, "[B, Q, M]",
      locations);
  const at::Tensor values = sampled(value, kernel_geometry);
  const at::Tensor keys = key ? sampled(*key, kernel_geometry) : at::Tensor();
  const at::Tensor queries = padded(query, kernel_geometry);
  const std::vector<int64_t> by_head{geometry.heads, geometry.channels};
  const at::Tensor grads = padded(grad_output.unflatten(2, by_head), kernel_geometry);
  const at::Tensor outputs = padded(output.unflatten(2, by_head), kernel_geometry);
  const at::Tensor log_sums = aligned(logsumexp);
  const at::Tensor grad_value = zero_rows(geometry, kernel_geometry, value);
  const at::Tensor grad_key = key ? zero_rows(geometry, kernel_geometry, value) : at::Tensor();
  const at::Tensor grad_query = dtype == at::kDouble
      ? at::zeros(queries.sizes(), queries.options())
      : at::empty(queries.sizes(), queries.options());
  const at::Tensor grad_locations = at::empty(locations.sizes(), locations.options());

  for_storage_type(dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    using A = compute_t<T>;
    run(KeyAwareBackward<T>{
        kernel_geometry, token_rows<const T>(values),
        key ? token_rows<const T>(keys) : TokenRows<const T>{},
        data<T>(queries), data<A>(locations), A(logit_scale(geometry)), data<T>(outputs),
        data<A>(log_sums), data<T>(grads), token_rows<A>(grad_value),
        key ? token_rows<A>(grad_key) : TokenRows<A>{}, data<T>(grad_query),
        data<A>(grad_locations)});
  });
  return {
      grad_query.narrow(3, 0, geometry.channels).contiguous(),
      key ? finish_rows(grad_key, *key) : at::empty({0}, value.options()),
      finish_rows(grad_value, value), grad_locations.to(sampling_locations.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(lite_detr, CUDA, library) {
  library.impl("key_aware_ms_deform_attn", key_aware_ms_deform_attn_cuda);
  library.impl("key_aware_ms_deform_attn_backward", key_aware_ms_deform_attn_backward_cuda);
}

}  // namespace lite_detr::cuda
