// Kernels that only call built-ins, to compare these with CUDA's.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>

#include "planted.h"

namespace lite_detr::harness {

namespace {

constexpr unsigned kAll = 0xffffffff;

__device__ int thread_number() { return blockIdx.x * blockDim.x + threadIdx.x; }

// Two 16-bit numbers in each float; the lower one of a pair is first in memory.
__device__ unsigned short* halves(float* numbers) {
  return reinterpret_cast<unsigned short*>(numbers);
}
__device__ const unsigned short* halves(const float* numbers) {
  return reinterpret_cast<const unsigned short*>(numbers);
}

__global__ void half_to_float(Arguments arguments) {
  const int i = thread_number();
  if (i >= arguments.size) return;
  const __half number = __ushort_as_half(__ldg(halves(arguments.input) + i));
  __stwb(arguments.output + i, __half2float(number));
}

__global__ void float_to_half(Arguments arguments) {
  const int i = thread_number();
  if (i >= 2 * arguments.size) return;
  const __half number = __float2half_rn(__ldg(arguments.input + i));
  __stwb(halves(arguments.output) + i, __half_as_ushort(number));
}

__global__ void half_pair_to_floats(Arguments arguments) {
  const int i = thread_number();
  if (2 * i >= arguments.size) return;
  const __half2 pair = __ldg(reinterpret_cast<const __half2*>(arguments.input) + i);
  __stwb(reinterpret_cast<float2*>(arguments.output) + i, __half22float2(pair));
}

__global__ void floats_to_half_pair(Arguments arguments) {
  const int i = thread_number();
  if (i >= arguments.size) return;
  const float2 pair = __ldg(reinterpret_cast<const float2*>(arguments.input) + i);
  __stwb(reinterpret_cast<__half2*>(arguments.output) + i, __float22half2_rn(pair));
}

__global__ void bfloat16_to_float(Arguments arguments) {
  const int i = thread_number();
  if (i >= arguments.size) return;
  const __nv_bfloat16 number = __ushort_as_bfloat16(__ldg(halves(arguments.input) + i));
  __stwb(arguments.output + i, __bfloat162float(number));
}

__global__ void float_to_bfloat16(Arguments arguments) {
  const int i = thread_number();
  if (i >= 2 * arguments.size) return;
  const __nv_bfloat16 number = __float2bfloat16_rn(__ldg(arguments.input + i));
  __stwb(halves(arguments.output) + i, __bfloat16_as_ushort(number));
}

__global__ void bfloat16_pair_to_floats(Arguments arguments) {
  const int i = thread_number();
  if (2 * i >= arguments.size) return;
  const __nv_bfloat162 pair = __ldg(reinterpret_cast<const __nv_bfloat162*>(arguments.input) + i);
  __stwb(reinterpret_cast<float2*>(arguments.output) + i, __bfloat1622float2(pair));
}

__global__ void floats_to_bfloat16_pair(Arguments arguments) {
  const int i = thread_number();
  if (i >= arguments.size) return;
  const float2 pair = __ldg(reinterpret_cast<const float2*>(arguments.input) + i);
  __stwb(reinterpret_cast<__nv_bfloat162*>(arguments.output) + i, __float22bfloat162_rn(pair));
}

// Exchanges the numbers of lanes, as type T.
template <typename T>
__global__ void shuffle(Arguments arguments) {
  const T lane = T(threadIdx.x);
  const T other = __shfl_sync(kAll, lane, arguments.argument, arguments.width);
  __stwb(arguments.output + threadIdx.x, float(other));
}

template <typename T>
__global__ void shuffle_xor(Arguments arguments) {
  const T lane = T(threadIdx.x);
  const T other = __shfl_xor_sync(kAll, lane, arguments.argument, arguments.width);
  __stwb(arguments.output + threadIdx.x, float(other));
}

// Each half of the warp by itself, the upper one twice.
__global__ void shuffle_in_halves(Arguments arguments) {
  float number = float(threadIdx.x);
  if (threadIdx.x < 16) {
    number = __shfl_xor_sync(0xffff, number, 1);
  } else {
    number = __shfl_xor_sync(0xffff0000, number, 2);
    number = __shfl_xor_sync(0xffff0000, number, 4);
  }
  __stwb(arguments.output + threadIdx.x, number);
}

// Whether all lanes below `argument` and, apart from them, all others say yes, which lanes from 20 on
// do not.
__global__ void vote(Arguments arguments) {
  const int below = int(threadIdx.x) < arguments.argument;
  const unsigned lower = (1u << arguments.argument) - 1;
  const int yes = threadIdx.x < 20;
  const int all = below ? __all_sync(lower, yes) : __all_sync(~lower, yes);
  __stwb(arguments.output + threadIdx.x, float(all));
}

// Stores each thread's number within the whole grid.
__global__ void number_threads(Arguments arguments) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  __stwb(arguments.output + i, float(i));
}

// Adds 1, 2, 3, 4 to four floats, and stores what the first of them was before.
__global__ void add_vectors(Arguments arguments) {
  const float4 old =
      atomicAdd(reinterpret_cast<float4*>(arguments.output), make_float4(1, 2, 3, 4));
  __stwb(arguments.output + 4 + threadIdx.x, old.x);
}

__global__ void add_doubles(Arguments arguments) {
  const double old = atomicAdd(reinterpret_cast<double*>(arguments.output), 0.1);
  __stwb(arguments.output + 2 + threadIdx.x, float(old));
}

// Each thread: 1 load of 16 bytes, 1 store of 8, 2 atomic additions of 4, and 3 shuffles.
__global__ void do_some_of_each(Arguments arguments) {
  const float4 loaded = __ldg(reinterpret_cast<const float4*>(arguments.input));
  float number = __shfl_sync(kAll, loaded.x, 0);
  number += __shfl_xor_sync(kAll, loaded.y, 1) + __shfl_xor_sync(kAll, loaded.z, 2);
  __syncwarp();
  float2* pairs = reinterpret_cast<float2*>(arguments.output);
  const int threads = gridDim.x * blockDim.x;
  __stwb(pairs + thread_number(), make_float2(number, loaded.w));
  atomicAdd(arguments.output + 2 * threads, 1.0f);
  atomicAdd(arguments.output + 2 * threads + 1, 2.0f);
}

__global__ void minima_and_maxima(Arguments arguments) {
  const float results[] = {
      float(min(-3, 2)), float(max(-3, 2)), float(min(3u, 2u)), float(max(3u, 2u)),
      min(1.5f, NAN), max(NAN, 1.5f), float(min(int64_t(1) << 40, int64_t(3))),
      __uint_as_float(__float_as_uint(-2.5f)), exp2f(3.0f), fmaf(2.0f, 3.0f, 4.0f)};
  for (int i = 0; i < arguments.size; ++i) __stwb(arguments.output + i, results[i]);
}

}  // namespace

Kernel find_builtins_kernel(const std::string& name) {
#define KERNEL(kernel) {#kernel, kernel}
  static const std::map<std::string, Kernel> kernels{
      KERNEL(half_to_float),
      KERNEL(float_to_half),
      KERNEL(half_pair_to_floats),
      KERNEL(floats_to_half_pair),
      KERNEL(bfloat16_to_float),
      KERNEL(float_to_bfloat16),
      KERNEL(bfloat16_pair_to_floats),
      KERNEL(floats_to_bfloat16_pair),
      KERNEL(shuffle<float>),
      KERNEL(shuffle<double>),
      KERNEL(shuffle<int>),
      KERNEL(shuffle<unsigned>),
      KERNEL(shuffle_xor<float>),
      KERNEL(shuffle_xor<double>),
      KERNEL(shuffle_xor<int>),
      KERNEL(shuffle_xor<unsigned>),
      KERNEL(shuffle_in_halves),
      KERNEL(vote),
      KERNEL(number_threads),
      KERNEL(add_vectors),
      KERNEL(add_doubles),
      KERNEL(do_some_of_each),
      KERNEL(minima_and_maxima),
  };
#undef KERNEL
  const auto found = kernels.find(name);
  return found == kernels.end() ? nullptr : found->second;
}

}  // namespace lite_detr::harness
