// PyTorch's tensors as the CUDA kernels take them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "../problem.h"
#include "../storage.h"
#include "kernels.h"

namespace lite_detr::cuda {

// The sizes of a problem, of which not all fit a kernel.
//
// Raises ValueError for more than kMaxLevels levels, heads wider than 256 channels, or more images,
// heads or queries than a grid has room for.
Geometry geometry(const Problem& problem, at::ScalarType dtype);

// Contiguous, on an address that the widest load takes.
at::Tensor aligned(const at::Tensor& tensor);

// [..., D] -> aligned [..., D'] with D' the channels of the geometry, zeros behind the D.
at::Tensor padded(const at::Tensor& tensor, const Geometry& geometry);

// Rows [B, S, M, D] to sample: the tensor itself where its strides will do, else its padded copy.
at::Tensor sampled(const at::Tensor& tensor, const Geometry& geometry);

// The gradient of rows [B, S, M, D'] that a kernel adds to: zeros in the type to compute in.
at::Tensor zero_rows(const Problem& problem, const Geometry& geometry, const at::Tensor& like);

// What was added up, as the gradient of a tensor [B, S, M, D].
at::Tensor finish_rows(const at::Tensor& sums, const at::Tensor& like);

// T may be const.
template <typename T>
Rows<T> rows(const at::Tensor& tensor) {
  constexpr int64_t kBytes = sizeof(T);
  return {
      data<T>(tensor), tensor.stride(0) * kBytes, tensor.stride(2) * kBytes,
      int32_t(tensor.stride(1) * kBytes)};
}

// Launches on PyTorch's current stream, unless there is nothing to do.
template <typename Arguments>
void run(const Arguments& arguments) {
  const Geometry& geometry = arguments.geometry;
  if (geometry.batch == 0 || geometry.queries == 0 || geometry.heads == 0) return;
  C10_CUDA_CHECK(launch(arguments, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace lite_detr::cuda
