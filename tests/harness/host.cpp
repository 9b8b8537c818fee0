// The operators' host code as one source: PyTorch's headers take most of the compiler's time.
#define LITE_DETR_HARNESS_HOST
#include "../../kernels/cuda/operators.cpp"
#include "../../kernels/cuda/run.cpp"
#include "../../kernels/geometry.cpp"
#include "../../kernels/library.cpp"
