#include "kernels.h"

#define LITE_DETR_TEXT_OF(...) #__VA_ARGS__
#define LITE_DETR_TEXT(...) LITE_DETR_TEXT_OF(__VA_ARGS__)

namespace lite_detr::cuda {

#ifndef LITE_DETR_PTX
#define LITE_DETR_PTX
#endif

// Those of this file, but all files are compiled with the same flags. setup.py gives the PTX.
const char* architectures() {
  return LITE_DETR_TEXT(__CUDA_ARCH_LIST__) "/" LITE_DETR_TEXT(LITE_DETR_PTX);
}

}  // namespace lite_detr::cuda
