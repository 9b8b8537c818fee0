// The operators on the CPU.
#include "../operators.h"
#include "run.h"

namespace lite_detr::cpu {

namespace {

class Call {
 public:
  static constexpr bool kGivesPositions = false;

  Call(Geometry geometry, const Tensor&) : geometry_(std::move(geometry)) {}

  static Tensor lay_out(const Tensor& tensor) { return api::contiguous(tensor); }

  // Given weights, or logits if the points are given by offsets.
  template <typename Points>
  Tensor forward(const Tensor& value, const Points& points, const Tensor& any_weights) const {
    const Tensor weights = api::contiguous(any_weights);
    const Tensor output = api::empty(
        {geometry_.batch, geometry_.queries, geometry_.heads, padded_channels(geometry_.channels)},
        value, value.scalar_type());

    for_storage_type(value.scalar_type(), [&](auto* storage) {
      using T = std::remove_pointer_t<decltype(storage)>;
      const auto kernel_points = points.template for_kernel<T>();
      const MsdaForward<T, std::decay_t<decltype(kernel_points)>> tensors{
          kernel_points, data<T>(weights), data<T>(output)};
      run_forward<T>(
          geometry_, Source<T>(value), Source<T>(), kernels_at(kernel_points).msda_forward, tensors);
    });
    return joined_heads(output, geometry_);
  }

  // The gradients of the value and of the weights or logits; logits also take the output. That of
  // the points goes into `points`.
  template <typename Points>
  std::tuple<Tensor, Tensor> backward(
      const Tensor& grad_output, const Tensor& value, const Points& points,
      const Tensor& any_weights, const std::optional<Tensor>& output) const {
    check_output("grad_output", grad_output, geometry_, value);
    const Tensor grads = padded_heads(grad_output, geometry_);
    Tensor outputs;
    if (output) {
      check_output("output", *output, geometry_, value);
      outputs = padded_heads(*output, geometry_);
    }
    const Tensor weights = api::contiguous(any_weights);
    const Tensor grad_value = api::empty_like(value);
    const Tensor grad_weights = api::empty_like(weights);

    for_storage_type(value.scalar_type(), [&](auto* storage) {
      using T = std::remove_pointer_t<decltype(storage)>;
      const auto kernel_points = points.template for_kernel<T>();
      const MsdaBackward<T, std::decay_t<decltype(kernel_points)>> tensors{
          kernel_points, data<T>(weights), outputs.defined() ? data<T>(outputs) : nullptr,
          data<T>(grads), data<T>(grad_weights)};
      run_backward<T>(
          geometry_, Source<T>(value), Source<T>(), data<T>(grad_value), nullptr, nullptr,
          kernels_at(kernel_points).msda_backward, tensors);
    });
    return {grad_value, grad_weights};
  }

  template <typename Points>
  std::tuple<Tensor, Tensor> key_aware_forward(
      const Tensor& query, const std::optional<Tensor>& key, const Tensor& value,
      const Points& points) const {
    const ScalarType dtype = value.scalar_type();
    const Tensor queries = pad_channels(query, kChannelMultiple);
    const Tensor output = api::empty_like(queries);
    const Tensor logsumexp = api::empty(
        {geometry_.batch, geometry_.queries, geometry_.heads}, value, compute_dtype(dtype));

    for_storage_type(dtype, [&](auto* storage) {
      using T = std::remove_pointer_t<decltype(storage)>;
      using A = compute_t<T>;
      const auto kernel_points = points.template for_kernel<T>();
      const KeyAwareForward<T, std::decay_t<decltype(kernel_points)>> tensors{
          kernel_points, data<T>(queries), A(logit_scale(geometry_)), data<T>(output),
          data<A>(logsumexp)};
      run_forward<T>(
          geometry_, Source<T>(value), key ? Source<T>(*key) : Source<T>(),
          kernels_at(kernel_points).key_aware_forward, tensors);
    });
    return {joined_heads(output, geometry_), logsumexp};
  }

  // The gradients of query, key and value.
  template <typename Points>
  std::tuple<Tensor, Tensor, Tensor> key_aware_backward(
      const Tensor& grad_output, const Tensor& query, const std::optional<Tensor>& key,
      const Tensor& value, const Points& points, const Tensor& output,
      const Tensor& logsumexp) const {
    check_output("grad_output", grad_output, geometry_, value);
    check_output("output", output, geometry_, value);
    check_logsumexp(logsumexp, geometry_, value);
    const Tensor queries = pad_channels(query, kChannelMultiple);
    const Tensor log_sums = api::contiguous(logsumexp);
    const Tensor grads = padded_heads(grad_output, geometry_);
    const Tensor outputs = padded_heads(output, geometry_);
    const Tensor grad_query = api::empty_like(queries);
    const Tensor grad_value = api::empty_like(value);
    const Tensor grad_key = api::empty(key ? value.sizes() : Sizes{0}, value, value.scalar_type());

    for_storage_type(value.scalar_type(), [&](auto* storage) {
      using T = std::remove_pointer_t<decltype(storage)>;
      using A = compute_t<T>;
      const auto kernel_points = points.template for_kernel<T>();
      const KeyAwareBackward<T, std::decay_t<decltype(kernel_points)>> tensors{
          kernel_points, data<T>(queries), data<T>(outputs), data<A>(log_sums), data<T>(grads),
          A(logit_scale(geometry_)), data<T>(grad_query)};
      run_backward<T>(
          geometry_, Source<T>(value), key ? Source<T>(*key) : Source<T>(), data<T>(grad_value),
          key ? data<T>(grad_key) : nullptr, data<T>(grad_query),
          kernels_at(kernel_points).key_aware_backward, tensors);
    });
    return {
        api::contiguous(api::narrow(grad_query, 3, 0, geometry_.channels)), grad_key, grad_value};
  }

 private:
  Geometry geometry_;
};

}  // namespace

LITE_DETR_LIBRARY_IMPL(CPU, library) { Operators<Call>::add_to(library); }

}  // namespace lite_detr::cpu
