// Registers the operators for CUDA tensors.
#include <torch/library.h>

#include <string>

#include "architectures.h"
#include "operators.h"

TORCH_LIBRARY_IMPL(lite_detr, CUDA, library) {
  library.impl("ms_deform_attn", lite_detr::cuda::ms_deform_attn);
  library.impl("ms_deform_attn_backward", lite_detr::cuda::ms_deform_attn_backward);
  library.impl("key_aware_ms_deform_attn", lite_detr::cuda::key_aware_ms_deform_attn);
  library.impl(
      "key_aware_ms_deform_attn_backward", lite_detr::cuda::key_aware_ms_deform_attn_backward);
}

TORCH_LIBRARY_IMPL(lite_detr, CompositeExplicitAutograd, library) {
  library.impl("cuda_architectures", [] { return std::string(lite_detr::cuda::architectures()); });
}
