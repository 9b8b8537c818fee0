// PyTorch's tensors as pointers to the numbers that kernels read.
#pragma once

#include <ATen/core/Tensor.h>

#include "number_types.h"

namespace lite_detr {

// Calls `run` with a null pointer, whose type is the storage type of a floating-point dtype.
template <typename Run>
void for_storage_type(at::ScalarType dtype, Run run) {
  switch (dtype) {
    case at::kDouble:
      return run(static_cast<double*>(nullptr));
    case at::kHalf:
      return run(static_cast<Float16*>(nullptr));
    case at::kBFloat16:
      return run(static_cast<BFloat16*>(nullptr));
    default:
      return run(static_cast<float*>(nullptr));
  }
}

template <typename T>
T* data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace lite_detr
