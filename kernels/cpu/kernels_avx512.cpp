// The kernels for AVX-512. They are chosen at run time, so this file is compiled for AVX-512
// whatever the compiler's flags say.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(\
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define LITE_DETR_ISA avx512
#define LITE_DETR_VECTOR_BYTES 64
#include "kernel_table.h"

namespace lite_detr::cpu {

const AllKernels avx512_kernels = {
    "avx512",
    avx512::table<float>(),
    avx512::table<double>(),
    avx512::table<Float16>(),
    avx512::table<BFloat16>()};

}  // namespace lite_detr::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
