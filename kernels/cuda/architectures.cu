#include "kernels.h"

#define LITE_DETR_TEXT_OF(...) #__VA_ARGS__
#define LITE_DETR_TEXT(...) LITE_DETR_TEXT_OF(__VA_ARGS__)

namespace lite_detr::cuda {

// Those of this file, but all files are compiled with the same flags.
const char* architectures() { return LITE_DETR_TEXT(__CUDA_ARCH_LIST__); }

}  // namespace lite_detr::cuda
