// How the CUDA operators run kernels: their geometry, tensors as they take them, and the launch.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "../geometry.h"
#include "../storage.h"
#include "kernels.h"

namespace lite_detr::cuda {

// The geometry as kernels take it, which not all fit.
//
// Raises ValueError for more than kMaxLevels levels, heads wider than 256 channels, or more images,
// heads or queries than a grid has room for.
KernelGeometry for_kernel(const Geometry& geometry, at::ScalarType dtype);

// A contiguous tensor, aligned for the widest load.
at::Tensor aligned(const at::Tensor& tensor);

// [..., D] -> aligned [..., D'] with the channels of the kernel's geometry, zeros after the D.
at::Tensor padded(const at::Tensor& tensor, const KernelGeometry& kernel_geometry);

// Rows [B, S, M, D] to sample: the tensor itself if its strides allow it, else its padded copy.
at::Tensor sampled(const at::Tensor& tensor, const KernelGeometry& kernel_geometry);

// The gradient of rows [B, S, M, D'], for a kernel to add to: zeros in the type of sums.
at::Tensor zero_rows(
    const Geometry& geometry, const KernelGeometry& kernel_geometry, const at::Tensor& like);

// Those sums as the gradient of a tensor [B, S, M, D].
at::Tensor finish_rows(const at::Tensor& sums, const at::Tensor& like);

// T may be const.
template <typename T>
TokenRows<T> token_rows(const at::Tensor& tensor) {
  constexpr int64_t kBytes = sizeof(T);
  return {
      data<T>(tensor), tensor.stride(0) * kBytes, tensor.stride(2) * kBytes,
      int32_t(tensor.stride(1) * kBytes)};
}

// Launches on PyTorch's current stream, unless there is nothing to do.
template <typename Arguments>
void run(const Arguments& arguments) {
  const KernelGeometry& geometry = arguments.geometry;
  if (geometry.batch == 0 || geometry.queries == 0 || geometry.heads == 0) return;
  C10_CUDA_CHECK(launch(arguments, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace lite_detr::cuda
