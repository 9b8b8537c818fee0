#include "run.h"

#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>
#include <string>

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

KernelGeometry for_kernel(const Geometry& geometry, at::ScalarType dtype) {
  const int64_t levels = geometry.levels.size();
  TORCH_CHECK_VALUE(
      levels <= kMaxLevels, "the CUDA kernels take up to ", kMaxLevels, " levels, got ", levels,
      ". Call the *_pytorch forms of lite_detr.ops");
  TORCH_CHECK_VALUE(
      geometry.batch <= kMaxGrid && geometry.heads <= kMaxGrid, "the CUDA kernels take up to ",
      kMaxGrid, " images and heads, got ", geometry.batch, " images and ", geometry.heads,
      " heads. Split the batch");
  TORCH_CHECK_VALUE(
      geometry.queries <= kMaxItems &&
          geometry.batch * geometry.heads * geometry.queries <= kMaxItems,
      "the CUDA kernels take up to ", kMaxItems, " queries, counted for each head and image, got ",
      geometry.batch, " x ", geometry.heads, " x ", geometry.queries, ". Split the batch");
  TORCH_CHECK_VALUE(
      geometry.points_in_all() <= kMaxItems, "the CUDA kernels take up to ", kMaxItems,
      " points of a query, got ", geometry.points_in_all(),
      ". Call the *_pytorch forms of lite_detr.ops");

  KernelGeometry kernel_geometry{};
  kernel_geometry.batch = geometry.batch;
  kernel_geometry.queries = geometry.queries;
  kernel_geometry.heads = geometry.heads;
  kernel_geometry.channels = head_width(geometry.channels, dtype);
  kernel_geometry.points = geometry.points;
  kernel_geometry.levels = levels;
  for (int64_t level = 0; level < levels; ++level) {
    kernel_geometry.height[level] = geometry.levels[level].height;
    kernel_geometry.width[level] = geometry.levels[level].width;
    kernel_geometry.start[level] = geometry.levels[level].start;
  }
  kernel_geometry.query_level = find_query_level(kernel_geometry);
  return kernel_geometry;
}

at::Tensor aligned(const at::Tensor& tensor) {
  const at::Tensor contiguous = tensor.contiguous();
  return is_aligned(contiguous) ? contiguous : contiguous.clone();
}

at::Tensor padded(const at::Tensor& tensor, const KernelGeometry& kernel_geometry) {
  return aligned(pad_channels(tensor, kernel_geometry.channels));
}

at::Tensor sampled(const at::Tensor& tensor, const KernelGeometry& kernel_geometry) {
  const int64_t bytes = tensor.element_size();
  const auto fits = [&](const at::Tensor& rows) {
    return rows.size(1) * (rows.stride(1) * bytes / kVectorBytes) <=
        std::numeric_limits<int32_t>::max();
  };
  bool as_it_is = tensor.size(3) == kernel_geometry.channels && tensor.stride(3) == 1 &&
      tensor.stride(1) * bytes <= std::numeric_limits<int32_t>::max() && fits(tensor) &&
      is_aligned(tensor);
  for (const int dimension : {0, 1, 2}) {
    as_it_is &= tensor.stride(dimension) * bytes % kVectorBytes == 0;
  }
  if (as_it_is) return tensor;
  const at::Tensor copy = padded(tensor, kernel_geometry);
  TORCH_CHECK_VALUE(
      fits(copy), "the CUDA kernels take tokens of up to 32 GiB an image, got ", copy.size(1),
      " tokens of ", copy.stride(1) * bytes, " bytes. Call the *_pytorch forms of lite_detr.ops");
  return copy;
}

at::Tensor zero_rows(
    const Geometry& geometry, const KernelGeometry& kernel_geometry, const at::Tensor& like) {
  return at::zeros(
      {geometry.batch, geometry.tokens, geometry.heads, kernel_geometry.channels},
      like.options().dtype(compute_dtype(like.scalar_type())));
}

at::Tensor finish_rows(const at::Tensor& sums, const at::Tensor& like) {
  return sums.narrow(3, 0, like.size(3)).to(like.scalar_type()).contiguous();
}

// It takes no tensor that would name a device.
LITE_DETR_LIBRARY_IMPL(CompositeExplicitAutograd, library) {
  library.impl("cuda_architectures", [] { return std::string(architectures()); });
}

}  // namespace lite_detr::cuda
