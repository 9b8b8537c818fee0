// Key-aware deformable attention on the CPU.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "run.h"

namespace lite_detr::cpu {

namespace {

std::tuple<at::Tensor, at::Tensor> key_aware_ms_deform_attn_cpu(
    const at::Tensor& query, const std::optional<at::Tensor>& key, const at::Tensor& value,
    const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations) {
  const Geometry geometry =
      check_key_aware(query, key, value, spatial_shapes, level_start_index, sampling_locations);
  const at::ScalarType dtype = value.scalar_type();
  const at::Tensor queries = pad_channels(query, kChannelMultiple);
  const at::Tensor locations = sampling_locations.to(compute_dtype(dtype)).contiguous();
  const at::Tensor output = at::empty(queries.sizes(), value.options());
  const at::Tensor logsumexp =
      at::empty({geometry.batch, geometry.queries, geometry.heads}, locations.options());

  for_storage_type(dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    using A = compute_t<T>;
    const KeyAwareForward<T> tensors{
        data<T>(queries), data<A>(locations), A(logit_scale(geometry)), data<T>(output),
        data<A>(logsumexp)};
    run_forward<T>(
        geometry, Source<T>(value), key ? Source<T>(*key) : Source<T>(),
        kernels_for<T>().key_aware_forward, tensors);
  });
  return {output.narrow(3, 0, geometry.channels).flatten(2), logsumexp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> key_aware_ms_deform_attn_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& query, const std::optional<at::Tensor>& key,
    const at::Tensor& value, const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations, const at::Tensor& output, const at::Tensor& logsumexp) {
  const Geometry geometry =
      check_key_aware(query, key, value, spatial_shapes, level_start_index, sampling_locations);
  check_output("grad_output", grad_output, geometry, value);
  check_output("output", output, geometry, value);
  const at::ScalarType dtype = value.scalar_type();
  const at::Tensor queries = pad_channels(query, kChannelMultiple);
  const at::Tensor locations = sampling_locations.to(compute_dtype(dtype)).contiguous();
  check_like(
      "logsumexp", logsumexp, {geometry.batch, geometry.queries, geometry.heads}, "[B, Q, M]",
      locations);
  const at::Tensor log_sums = logsumexp.contiguous();
  const std::vector<int64_t> by_head{geometry.heads, geometry.channels};
  const at::Tensor grads = pad_channels(grad_output.unflatten(2, by_head), kChannelMultiple);
  const at::Tensor outputs = pad_channels(output.unflatten(2, by_head), kChannelMultiple);
  const at::Tensor grad_query = at::empty(queries.sizes(), queries.options());
  const at::Tensor grad_value = at::empty(value.sizes(), value.options());
  const at::Tensor grad_key = at::empty(key ? value.sizes() : at::IntArrayRef{0}, value.options());
  const at::Tensor grad_locations = at::empty(locations.sizes(), locations.options());

  for_storage_type(dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    using A = compute_t<T>;
    const KeyAwareBackward<T> tensors{
        data<T>(queries),  data<A>(locations), data<T>(outputs),
        data<A>(log_sums), data<T>(grads),     A(logit_scale(geometry)),
        data<T>(grad_query), data<A>(grad_locations)};
    run_backward<T>(
        geometry, Source<T>(value), key ? Source<T>(*key) : Source<T>(), data<T>(grad_value),
        key ? data<T>(grad_key) : nullptr, kernels_for<T>().key_aware_backward, tensors);
  });
  return {
      grad_query.narrow(3, 0, geometry.channels).contiguous(),
      grad_key, grad_value,
      grad_locations.to(sampling_locations.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(lite_detr, CPU, library) {
  library.impl("key_aware_ms_deform_attn", key_aware_ms_deform_attn_cpu);
  library.impl("key_aware_ms_deform_attn_backward", key_aware_ms_deform_attn_backward_cpu);
}

}  // namespace lite_detr::cpu
