// One operator that runs the kernels of planted.cu and builtins.cu.
#include <c10/cuda/CUDAException.h>
#include <torch/library.h>

#include "planted.h"

namespace lite_detr::harness {

namespace {

dim3 to_dim3(at::IntArrayRef size) {
  TORCH_CHECK_VALUE(size.size() == 3, "a size is [x, y, z], got ", size);
  return dim3(unsigned(size[0]), unsigned(size[1]), unsigned(size[2]));
}

void run(
    const std::string& name, const at::Tensor& input, const at::Tensor& output,
    at::IntArrayRef grid, at::IntArrayRef block, int64_t argument, int64_t width) {
  Kernel kernel = find_planted_kernel(name);
  if (kernel == nullptr) kernel = find_builtins_kernel(name);
  TORCH_CHECK_VALUE(kernel != nullptr, "there is no kernel ", name);
  const Arguments arguments{
      static_cast<const float*>(input.const_data_ptr()), static_cast<float*>(output.data_ptr()),
      int(output.nbytes() / sizeof(float)), int(argument), int(width)};
  C10_CUDA_CHECK(launch_kernel(kernel, arguments, to_dim3(grid), to_dim3(block)));
}

}  // namespace

TORCH_LIBRARY(lite_detr_harness_planted, library) {
  library.def(
      "run(str kernel, Tensor input, Tensor(a!) output, int[] grid, int[] block, int argument=0, "
      "int width=32) -> ()",
      run);
}

}  // namespace lite_detr::harness
