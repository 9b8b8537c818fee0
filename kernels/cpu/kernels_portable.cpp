// The kernels for any processor: four floats at a time, which both SSE2 and NEON have.
#define LITE_DETR_ISA portable
#define LITE_DETR_VECTOR_BYTES 16
#include "kernel_table.h"

namespace lite_detr::cpu {

const AllKernels portable_kernels = {
    "portable",
    portable::table<float>(),
    portable::table<double>(),
    portable::table<Float16>(),
    portable::table<BFloat16>()};

}  // namespace lite_detr::cpu
