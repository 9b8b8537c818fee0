// What the operators need of PyTorch, by one of its two interfaces.
//
// With TORCH_TARGET_VERSION, which setup.py sets for PyTorch 2.10 and later, it is LibTorch's stable
// ABI: the extension then runs with every PyTorch from that version on. Without, it is the C++ API of
// the PyTorch that is installed. Older versions have no other; the CUDA kernels need it also, as the
// stable ABI does not tell whether users want deterministic algorithms.
#pragma once

#ifdef TORCH_TARGET_VERSION
#include "torch_stable_api.h"
#else

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <vector>

namespace lite_detr {

using Tensor = at::Tensor;
using ScalarType = at::ScalarType;
using Sizes = at::IntArrayRef;

namespace api {

using at::get_num_threads;
using at::parallel_for;

// New tensors are contiguous, and on the device of `like`.
inline Tensor empty(Sizes sizes, const Tensor& like, ScalarType dtype) {
  return at::empty(sizes, like.options().dtype(dtype));
}

inline Tensor empty_like(const Tensor& tensor) { return at::empty(tensor.sizes(), tensor.options()); }

inline Tensor to(const Tensor& tensor, ScalarType dtype) { return tensor.to(dtype); }
inline Tensor to_cpu(const Tensor& tensor) { return tensor.cpu(); }
inline Tensor contiguous(const Tensor& tensor) { return tensor.contiguous(); }
inline Tensor view(const Tensor& tensor, Sizes sizes) { return tensor.view(sizes); }
inline Tensor flatten(const Tensor& tensor, int64_t first) { return tensor.flatten(first); }
inline Tensor unsqueeze(const Tensor& tensor, int64_t dim) { return tensor.unsqueeze(dim); }
inline Tensor narrow(const Tensor& tensor, int64_t dim, int64_t start, int64_t length) {
  return tensor.narrow(dim, start, length);
}

// A tensor [n] on the device of `like`, filled without a copy from the host: that would wait for the
// device, and no CUDA graph could hold it.
inline Tensor fill(const std::vector<double>& numbers, const Tensor& like) {
  const Tensor tensor = at::empty({int64_t(numbers.size())}, like.options());
  for (size_t i = 0; i < numbers.size(); ++i) tensor.select(0, i).fill_(numbers[i]);
  return tensor;
}

// Adds `missing` zeros at the end of the last dimension.
inline Tensor pad(const Tensor& tensor, int64_t missing) {
  return at::constant_pad_nd(tensor, {0, missing});
}

inline Tensor sum(const Tensor& tensor, Sizes dims) { return tensor.sum(dims); }
inline Tensor multiply(const Tensor& a, const Tensor& b) { return a * b; }
inline Tensor scale(const Tensor& tensor, double factor) { return tensor * factor; }
inline Tensor join(const Tensor& a, const Tensor& b, int64_t dim) { return at::cat({a, b}, dim); }

}  // namespace api
}  // namespace lite_detr

#define LITE_DETR_CHECK_VALUE TORCH_CHECK_VALUE
#define LITE_DETR_CHECK_TYPE TORCH_CHECK_TYPE
#define LITE_DETR_LIBRARY(library) TORCH_LIBRARY(lite_detr, library)
#define LITE_DETR_LIBRARY_IMPL(key, library) TORCH_LIBRARY_IMPL(lite_detr, key, library)
#define LITE_DETR_KERNEL(function) (function)

#endif
