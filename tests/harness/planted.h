// Kernels that test the harness: some with planted faults, some that only call built-ins.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace lite_detr::harness {

struct Arguments {
  const float* input;
  float* output;
  int size;      // of the output, in floats
  int argument;  // of a shuffle
  int width;     // of a shuffle
};

using Kernel = void (*)(Arguments);

// Null if there is no kernel of this name.
Kernel find_planted_kernel(const std::string& name);
Kernel find_builtins_kernel(const std::string& name);

cudaError_t launch_kernel(Kernel kernel, Arguments arguments, dim3 grid, dim3 block);

}  // namespace lite_detr::harness
