#pragma once

#include <c10/util/Exception.h>

#include "../../cuda_runtime_api.h"

#define C10_CUDA_CHECK(expression)                                                  \
  do {                                                                              \
    const cudaError_t error = (expression);                                         \
    TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));   \
  } while (0)
