// The GPUs that the CUDA kernels are compiled for, as the compiler lists them: "800,900".
#pragma once

namespace lite_detr::cuda {

const char* architectures();

}  // namespace lite_detr::cuda
