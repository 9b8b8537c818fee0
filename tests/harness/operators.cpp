// The CUDA operators for tensors in the harness's device memory, in a namespace of their own.
#include <torch/library.h>

#include "../../kernels/cuda/operators.h"

// The schemas are those of lite_detr, whose file registers them in this namespace instead.
#undef TORCH_LIBRARY
#define TORCH_LIBRARY(ns, library) TORCH_LIBRARY_FRAGMENT(LITE_DETR_HARNESS_NAMESPACE, library)
#include "../../kernels/library.cpp"

TORCH_LIBRARY_IMPL(LITE_DETR_HARNESS_NAMESPACE, CPU, library) {
  library.impl("ms_deform_attn", lite_detr::cuda::ms_deform_attn);
  library.impl("ms_deform_attn_backward", lite_detr::cuda::ms_deform_attn_backward);
  library.impl("key_aware_ms_deform_attn", lite_detr::cuda::key_aware_ms_deform_attn);
  library.impl(
      "key_aware_ms_deform_attn_backward", lite_detr::cuda::key_aware_ms_deform_attn_backward);
}
