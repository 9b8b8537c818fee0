// The operators on CUDA devices.
#include "../operators.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>

#include "run.h"

namespace lite_detr::cuda {

namespace {

class Call {
 public:
  using Tensor = at::Tensor;
  static constexpr bool kGivesPositions = true;

  Call(const Geometry& geometry, const Tensor& value)
      : geometry_(geometry),
        kernel_geometry_(for_kernel(geometry, value.scalar_type())),
        guard_(value.device()) {}

  static Tensor lay_out(const Tensor& tensor) { return aligned(tensor); }

  // Given weights, or logits if the points are given by offsets.
  template <typename Points>
  Tensor forward(const Tensor& value, const Points& points, const Tensor& any_weights) const {
    const Tensor values = sampled(value, kernel_geometry_);
    const Tensor weights = aligned(any_weights);
    const Tensor output = at::empty(
        {geometry_.batch, geometry_.queries, geometry_.heads, kernel_geometry_.channels},
        value.options());

    for_storage_type(value.scalar_type(), [&](auto* storage) {
      using T = std::remove_pointer_t<decltype(storage)>;
      const auto kernel_points = points.template for_kernel<T>();
      run(MsdaForward<T, std::decay_t<decltype(kernel_points)>>{
          kernel_geometry_, token_rows<const T>(values), kernel_points, data<T>(weights),
          data<T>(output)});
    });
    return output.narrow(3, 0, geometry_.channels).flatten(2);
  }

  // The gradients of the value and of the weights or logits; logits also take the output. That of
  // the points goes into `points`.
  template <typename Points>
  std::tuple<Tensor, Tensor> backward(
      const Tensor& grad_output, const Tensor& value, const Points& points,
      const Tensor& any_weights, const std::optional<Tensor>& output) const {
    // The order of its atomic additions is not fixed.
    at::globalContext().alertNotDeterministic("lite_detr::ms_deform_attn_backward on CUDA");
    check_output("grad_output", grad_output, geometry_, value);
    Tensor outputs;
    if (output) {
      check_output("output", *output, geometry_, value);
      outputs = padded_heads(*output);
    }
    const Tensor values = sampled(value, kernel_geometry_);
    const Tensor weights = aligned(any_weights);
    const Tensor grads = padded_heads(grad_output);
    const Tensor grad_value = zero_rows(geometry_, kernel_geometry_, value);
    const Tensor grad_weights = at::empty(weights.sizes(), weights.options());

    for_storage_type(value.scalar_type(), [&](auto* storage) {
      using T = std::remove_pointer_t<decltype(storage)>;
      const auto kernel_points = points.template for_kernel<T>();
      run(MsdaBackward<T, std::decay_t<decltype(kernel_points)>>{
          kernel_geometry_, token_rows<const T>(values), kernel_points, data<T>(weights),
          outputs.defined() ? data<T>(outputs) : nullptr, data<T>(grads),
          token_rows<compute_t<T>>(grad_value), data<T>(grad_weights)});
    });
    return {finish_rows(grad_value, value), grad_weights};
  }

  template <typename Points>
  std::tuple<Tensor, Tensor> key_aware_forward(
      const Tensor& query, const std::optional<Tensor>& key, const Tensor& value,
      const Points& points) const {
    const at::ScalarType dtype = value.scalar_type();
    const Tensor values = sampled(value, kernel_geometry_);
    const Tensor keys = key ? sampled(*key, kernel_geometry_) : Tensor();
    const Tensor queries = padded(query, kernel_geometry_);
    const Tensor output = at::empty(queries.sizes(), value.options());
    const Tensor logsumexp = at::empty(
        {geometry_.batch, geometry_.queries, geometry_.heads},
        value.options().dtype(compute_dtype(dtype)));

    for_storage_type(dtype, [&](auto* storage) {
      using T = std::remove_pointer_t<decltype(storage)>;
      using A = compute_t<T>;
      const auto kernel_points = points.template for_kernel<T>();
      run(KeyAwareForward<T, std::decay_t<decltype(kernel_points)>>{
          kernel_geometry_, token_rows<const T>(values),
          key ? token_rows<const T>(keys) : TokenRows<const T>{}, data<T>(queries), kernel_points,
          A(logit_scale(geometry_)), data<T>(output), data<A>(logsumexp)});
    });
    return {output.narrow(3, 0, geometry_.channels).flatten(2), logsumexp};
  }

  // The gradients of query, key and value.
  template <typename Points>
  std::tuple<Tensor, Tensor, Tensor> key_aware_backward(
      const Tensor& grad_output, const Tensor& query, const std::optional<Tensor>& key,
      const Tensor& value, const Points& points, const Tensor& output,
      const Tensor& logsumexp) const {
    at::globalContext().alertNotDeterministic(
        "lite_detr::key_aware_ms_deform_attn_backward on CUDA");
    check_output("grad_output", grad_output, geometry_, value);
    check_output("output", output, geometry_, value);
    check_logsumexp(logsumexp, geometry_, value);
    const at::ScalarType dtype = value.scalar_type();
    const Tensor values = sampled(value, kernel_geometry_);
    const Tensor keys = key ? sampled(*key, kernel_geometry_) : Tensor();
    const Tensor queries = padded(query, kernel_geometry_);
    const Tensor grads = padded_heads(grad_output);
    const Tensor outputs = padded_heads(output);
    const Tensor log_sums = aligned(logsumexp);
    const Tensor grad_value = zero_rows(geometry_, kernel_geometry_, value);
    const Tensor grad_key = key ? zero_rows(geometry_, kernel_geometry_, value) : Tensor();
    const Tensor grad_query = at::empty(queries.sizes(), queries.options());

    for_storage_type(dtype, [&](auto* storage) {
      using T = std::remove_pointer_t<decltype(storage)>;
      using A = compute_t<T>;
      const auto kernel_points = points.template for_kernel<T>();
      run(KeyAwareBackward<T, std::decay_t<decltype(kernel_points)>>{
          kernel_geometry_, token_rows<const T>(values),
          key ? token_rows<const T>(keys) : TokenRows<const T>{}, data<T>(queries), kernel_points,
          A(logit_scale(geometry_)), data<T>(outputs), data<A>(log_sums), data<T>(grads),
          token_rows<A>(grad_value), key ? token_rows<A>(grad_key) : TokenRows<A>{},
          data<T>(grad_query)});
    });
    return {
        grad_query.narrow(3, 0, geometry_.channels).contiguous(),
        key ? finish_rows(grad_key, *key) : at::empty({0}, value.options()),
        finish_rows(grad_value, value)};
  }

 private:
  // [B, Q, M * D] -> [B, Q, M, D'], with the channels of kernels.
  Tensor padded_heads(const Tensor& tensor) const {
    return padded(tensor.unflatten(2, {geometry_.heads, geometry_.channels}), kernel_geometry_);
  }

  Geometry geometry_;
  KernelGeometry kernel_geometry_;
  c10::cuda::CUDAGuard guard_;
};

}  // namespace

LITE_DETR_LIBRARY_IMPL(CUDA, library) { Operators<Call>::add_to(library); }

}  // namespace lite_detr::cuda
