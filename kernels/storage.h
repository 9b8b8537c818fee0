// PyTorch's tensors as pointers to the numbers that kernels read.
#pragma once

#include "number_types.h"
#include "torch_api.h"

namespace lite_detr {

// Calls `run` with a null pointer, whose type is the storage type of a floating-point dtype.
template <typename Run>
void for_storage_type(ScalarType dtype, Run run) {
  switch (dtype) {
    case ScalarType::Double:
      return run(static_cast<double*>(nullptr));
    case ScalarType::Half:
      return run(static_cast<Float16*>(nullptr));
    case ScalarType::BFloat16:
      return run(static_cast<BFloat16*>(nullptr));
    default:
      return run(static_cast<float*>(nullptr));
  }
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace lite_detr
