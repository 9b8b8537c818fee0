// The kernels for AVX2 with FMA. They are chosen at run time, so this file is compiled for AVX2
// whatever the compiler's flags say.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LITE_DETR_ISA avx2
#define LITE_DETR_VECTOR_BYTES 32
#include "kernel_table.h"

namespace lite_detr::cpu {

const AllKernels avx2_kernels = {
    "avx2",
    avx2::table<float>(),
    avx2::table<double>(),
    avx2::table<Float16>(),
    avx2::table<BFloat16>()};

}  // namespace lite_detr::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
