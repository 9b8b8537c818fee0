#include "tensors.h"

#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>

namespace lite_detr::cuda {

namespace {

bool is_aligned(const at::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kVectorBytes == 0;
}

int32_t head_width(int64_t channels, at::ScalarType dtype) {
  const int least = dtype == at::kDouble ? kMinHeadWidth<double> : kMinHeadWidth<float>;
  for (const int width : kHeadWidths) {
    if (width >= least && width >= channels) return width;
  }
  C10_THROW_ERROR(
      ValueError,
      c10::str(
          "the CUDA kernels take heads of up to ", std::end(kHeadWidths)[-1], " channels, got ",
          channels, ". Use more heads, or call the *_pytorch forms of lite_detr.ops"));
}

}  // namespace

Geometry geometry(const Problem& problem, at::ScalarType dtype) {
  const int64_t levels = problem.levels.size();
  TORCH_CHECK_VALUE(
      levels <= kMaxLevels, "the CUDA kernels take up to ", kMaxLevels, " levels, got ", levels,
      ". Call the *_pytorch forms of lite_detr.ops");
  TORCH_CHECK_VALUE(
      problem.batch <= kMaxGrid && problem.heads <= kMaxGrid, "the CUDA kernels take up to ",
      kMaxGrid, " images and heads, got ", problem.batch, " images and ", problem.heads,
      " heads. Split the batch");
  TORCH_CHECK_VALUE(
      problem.queries <= kMaxItems &&
          problem.batch * problem.heads * problem.queries <= kMaxItems,
      "the CUDA kernels take up to ", kMaxItems, " queries, counted for each head and image, got ",
      problem.batch, " x ", problem.heads, " x ", problem.queries, ". Split the batch");
  TORCH_CHECK_VALUE(
      problem.points_in_all() <= kMaxItems, "the CUDA kernels take up to ", kMaxItems,
      " points of a query, got ", problem.points_in_all(),
      ". Call the *_pytorch forms of lite_detr.ops");

  Geometry geometry{};
  geometry.batch = problem.batch;
  geometry.queries = problem.queries;
  geometry.heads = problem.heads;
  geometry.channels = head_width(problem.channels, dtype);
  geometry.points = problem.points;
  geometry.levels = levels;
  for (int64_t level = 0; level < levels; ++level) {
    geometry.height[level] = problem.levels[level].height;
    geometry.width[level] = problem.levels[level].width;
    geometry.start[level] = problem.levels[level].start;
  }
  return geometry;
}

at::Tensor aligned(const at::Tensor& tensor) {
  const at::Tensor contiguous = tensor.contiguous();
  return is_aligned(contiguous) ? contiguous : contiguous.clone();
}

at::Tensor padded(const at::Tensor& tensor, const Geometry& geometry) {
  return aligned(pad_channels(tensor, geometry.channels));
}

at::Tensor sampled(const at::Tensor& tensor, const Geometry& geometry) {
  const int64_t bytes = tensor.element_size();
  bool as_it_is = tensor.size(3) == geometry.channels && tensor.stride(3) == 1 &&
      tensor.stride(1) * bytes <= std::numeric_limits<int32_t>::max() && is_aligned(tensor);
  for (const int dimension : {0, 1, 2}) {
    as_it_is &= tensor.stride(dimension) * bytes % kVectorBytes == 0;
  }
  return as_it_is ? tensor : padded(tensor, geometry);
}

at::Tensor zero_rows(const Problem& problem, const Geometry& geometry, const at::Tensor& like) {
  return at::zeros(
      {problem.batch, problem.tokens, problem.heads, geometry.channels},
      like.options().dtype(compute_dtype(like.scalar_type())));
}

at::Tensor finish_rows(const at::Tensor& sums, const at::Tensor& like) {
  return sums.narrow(3, 0, like.size(3)).to(like.scalar_type()).contiguous();
}

}  // namespace lite_detr::cuda
