// Key-aware deformable attention on CUDA devices.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>

#include "operators.h"
#include "tensors.h"

namespace lite_detr::cuda {

std::tuple<at::Tensor, at::Tensor> key_aware_ms_deform_attn(
    const at::Tensor& query, const std::optional<at::Tensor>& key, const at::Tensor& value,
    const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations) {
  const Problem problem =
      check_key_aware(query, key, value, spatial_shapes, level_start_index, sampling_locations);
  const at::ScalarType dtype = value.scalar_type();
  const Geometry sizes = geometry(problem, dtype);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor values = sampled(value, sizes);
  const at::Tensor keys = key ? sampled(*key, sizes) : at::Tensor();
  const at::Tensor queries = padded(query, sizes);
  const at::Tensor locations = aligned(sampling_locations.to(compute_dtype(dtype)));
  const at::Tensor output = at::empty(queries.sizes(), value.options());
  const at::Tensor logsumexp =
      at::empty({problem.batch, problem.queries, problem.heads}, locations.options());

  for_storage_type(dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    using A = compute_t<T>;
    run(KeyAwareForward<T>{
        sizes, rows<const T>(values), key ? rows<const T>(keys) : Rows<const T>{},
        data<T>(queries), data<A>(locations), A(logit_scale(problem)), data<T>(output),
        data<A>(logsumexp)});
  });
  return {output.narrow(3, 0, problem.channels).flatten(2), logsumexp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> key_aware_ms_deform_attn_backward(
    const at::Tensor& grad_output, const at::Tensor& query, const std::optional<at::Tensor>& key,
    const at::Tensor& value, const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations, const at::Tensor& output, const at::Tensor& logsumexp) {
  // Its atomic additions come in any order.
  at::globalContext().alertNotDeterministic(
      "lite_detr::key_aware_ms_deform_attn_backward on CUDA");
  const Problem problem =
      check_key_aware(query, key, value, spatial_shapes, level_start_index, sampling_locations);
  check_output("grad_output", grad_output, problem, value);
  check_output("output", output, problem, value);
  const at::ScalarType dtype = value.scalar_type();
  const Geometry sizes = geometry(problem, dtype);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor locations = aligned(sampling_locations.to(compute_dtype(dtype)));
  check_like(
      "logsumexp", logsumexp, {problem.batch, problem.queries, problem.heads}, "[B, Q, M]",
      locations);
  const at::Tensor values = sampled(value, sizes);
  const at::Tensor keys = key ? sampled(*key, sizes) : at::Tensor();
  const at::Tensor queries = padded(query, sizes);
  const std::vector<int64_t> by_head{problem.heads, problem.channels};
  const at::Tensor grads = padded(grad_output.unflatten(2, by_head), sizes);
  const at::Tensor outputs = padded(output.unflatten(2, by_head), sizes);
  const at::Tensor log_sums = aligned(logsumexp);
  const at::Tensor grad_value = zero_rows(problem, sizes, value);
  const at::Tensor grad_key = key ? zero_rows(problem, sizes, value) : at::Tensor();
  const at::Tensor grad_query = dtype == at::kDouble
      ? at::zeros(queries.sizes(), queries.options())
      : at::empty(queries.sizes(), queries.options());
  const at::Tensor grad_locations = at::empty(locations.sizes(), locations.options());

  for_storage_type(dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    using A = compute_t<T>;
    run(KeyAwareBackward<T>{
        sizes, rows<const T>(values), key ? rows<const T>(keys) : Rows<const T>{},
        data<T>(queries), data<A>(locations), A(logit_scale(problem)), data<T>(outputs),
        data<A>(log_sums), data<T>(grads), rows<A>(grad_value),
        key ? rows<A>(grad_key) : Rows<A>{}, data<T>(grad_query), data<A>(grad_locations)});
  });
  return {
      grad_query.narrow(3, 0, problem.channels).contiguous(),
      key ? finish_rows(grad_key, *key) : at::empty({0}, value.options()),
      finish_rows(grad_value, value), grad_locations.to(sampling_locations.scalar_type())};
}

}  // namespace lite_detr::cuda
