// The operators' host code as one source: PyTorch's headers take most of the compiler's time.
#define LITE_DETR_HARNESS_HOST
#include "../../kernels/cuda/key_aware_ms_deform_attn.cpp"
#include "../../kernels/cuda/ms_deform_attn.cpp"
#include "../../kernels/cuda/run.cpp"
#include "../../kernels/geometry.cpp"
#include "../../kernels/library.cpp"
