// Kernels with one fault each, beside the same kernels without it.
#include <cuda_runtime.h>

#include <map>

#include "planted.h"

namespace lite_detr::harness {

namespace {

constexpr unsigned kAll = 0xffffffff;

__device__ int thread_number() { return blockIdx.x * blockDim.x + threadIdx.x; }

__global__ void copy(Arguments arguments) {
  const int i = thread_number();
  if (i < arguments.size) __stwb(arguments.output + i, __ldg(arguments.input + i));
}

__global__ void read_past_the_end(Arguments arguments) {
  const int i = thread_number();
  if (i < arguments.size) __stwb(arguments.output + i, __ldg(arguments.input + i + 1));
}

__global__ void read_before_the_beginning(Arguments arguments) {
  const int i = thread_number();
  if (i < arguments.size) __stwb(arguments.output + i, __ldg(arguments.input + i - 1));
}

__global__ void write_past_the_end(Arguments arguments) {
  const int i = thread_number();
  if (i <= arguments.size) __stwb(arguments.output + i, 1.0f);
}

__global__ void add_past_the_end(Arguments arguments) {
  const int i = thread_number();
  if (i <= arguments.size) atomicAdd(arguments.output + i, 1.0f);
}

__global__ void leave_the_last_one_unwritten(Arguments arguments) {
  const int i = thread_number();
  if (i < arguments.size - 1) __stwb(arguments.output + i, __ldg(arguments.input + i));
}

// Copies vectors, starting at float number `argument` of the input.
__global__ void copy_vectors(Arguments arguments) {
  const int i = 4 * thread_number();
  if (i >= arguments.size) return;
  const float* from = arguments.input + i + arguments.argument;
  const float4 vector = __ldg(reinterpret_cast<const float4*>(from));
  __stwb(reinterpret_cast<float4*>(arguments.output + i), vector);
}

__global__ void read_without_a_check(Arguments arguments) {
  const int i = thread_number();
  if (i < arguments.size) __stwb(arguments.output + i, arguments.input[i]);
}

__global__ void write_without_a_check(Arguments arguments) {
  const int i = thread_number();
  if (i < arguments.size) arguments.output[i] = __ldg(arguments.input + i);
}

__global__ void read_from_null(Arguments arguments) {
  const volatile float* null = nullptr;
  __stwb(arguments.output, *null);
}

__device__ __attribute__((noinline)) int recurse(volatile int* depth) {
  volatile int deeper = *depth + 1;
  return recurse(&deeper) + deeper;
}

__global__ void use_up_the_stack(Arguments arguments) {
  volatile int depth = 0;
  __stwb(arguments.output, float(recurse(&depth)));
}

// The sum over a warp, whose mask must name all lanes that take part.
__device__ void sum_warp(Arguments arguments, unsigned mask) {
  float sum = __ldg(arguments.input + threadIdx.x);
  for (int span = 16; span > 0; span /= 2) sum += __shfl_xor_sync(mask, sum, span);
  __stwb(arguments.output + threadIdx.x, sum);
}

__global__ void sum(Arguments arguments) { sum_warp(arguments, kAll); }

__global__ void sum_with_a_lane_missing(Arguments arguments) { sum_warp(arguments, ~(1u << 13)); }

__global__ void sum_without_a_lane(Arguments arguments) {
  if (threadIdx.x != 13) sum_warp(arguments, ~(1u << 13));
}

__global__ void sum_while_a_lane_is_elsewhere(Arguments arguments) {
  if (threadIdx.x == 13) {
    __syncwarp(1u << 13 | 1u);
  } else {
    sum_warp(arguments, kAll);
  }
}

__global__ void sum_while_a_lane_is_at_the_barrier(Arguments arguments) {
  if (threadIdx.x == 13) __syncthreads();
  sum_warp(arguments, kAll);
}

__global__ void shuffle_with_a_width_of_three(Arguments arguments) {
  __stwb(arguments.output + threadIdx.x, __shfl_sync(kAll, 1.0f, 0, 3));
}

// The upper half of the warp exits; the lower half continues, and reads from its own lanes.
__global__ void shuffle_after_others_exited(Arguments arguments) {
  if (threadIdx.x >= 16) return;
  __stwb(arguments.output + threadIdx.x, __shfl_xor_sync(kAll, float(threadIdx.x), 1));
}

__global__ void shuffle_from_a_lane_that_exited(Arguments arguments) {
  if (threadIdx.x >= 16) return;
  __stwb(arguments.output + threadIdx.x, __shfl_sync(kAll, float(threadIdx.x), 20));
}

// Each lane stores its number and loads its neighbour's.
__global__ void exchange_unsynchronised(Arguments arguments) {
  __stwb(arguments.output + threadIdx.x, float(threadIdx.x));
  const float other = __ldcg(arguments.output + (threadIdx.x ^ 1));
  __syncwarp();
  __stwb(arguments.output + threadIdx.x, other);
}

__global__ void exchange(Arguments arguments) {
  __stwb(arguments.output + threadIdx.x, float(threadIdx.x));
  __syncwarp();
  const float other = __ldcg(arguments.output + (threadIdx.x ^ 1));
  __syncwarp();
  __stwb(arguments.output + threadIdx.x, other);
}

// The same between the first and the last thread of the block, the second and the second to last,
// ...
__global__ void exchange_in_the_block_unsynchronised(Arguments arguments) {
  __stwb(arguments.output + threadIdx.x, float(threadIdx.x));
  __syncwarp();
  const float other = __ldcg(arguments.output + blockDim.x - 1 - threadIdx.x);
  __syncthreads();
  __stwb(arguments.output + threadIdx.x, other);
}

__global__ void exchange_in_the_block(Arguments arguments) {
  __stwb(arguments.output + threadIdx.x, float(threadIdx.x));
  __syncthreads();
  const float other = __ldcg(arguments.output + blockDim.x - 1 - threadIdx.x);
  __syncthreads();
  __stwb(arguments.output + threadIdx.x, other);
}

// The same through shared memory.
__device__ void exchange_by_shared_memory(Arguments arguments, bool synchronised, int beyond) {
  float* numbers = static_cast<float*>(shared_memory(32 * sizeof(float)));
  numbers[threadIdx.x + beyond] = float(threadIdx.x);
  if (synchronised) __syncwarp();
  __stwb(arguments.output + threadIdx.x, numbers[threadIdx.x ^ 1]);
}

__global__ void exchange_shared(Arguments arguments) {
  exchange_by_shared_memory(arguments, true, 0);
}

__global__ void exchange_shared_unsynchronised(Arguments arguments) {
  exchange_by_shared_memory(arguments, false, 0);
}

__global__ void write_beyond_shared_memory(Arguments arguments) {
  exchange_by_shared_memory(arguments, true, 1);
}

__global__ void count_threads(Arguments arguments) { atomicAdd(arguments.output, 1.0f); }

__global__ void count_threads_without_atomics(Arguments arguments) {
  __stwb(arguments.output, __ldcg(arguments.output) + 1.0f);
}

__global__ void read_only_what_is_written(Arguments arguments) {
  __stwb(arguments.output, 1.0f);
  __stwb(arguments.output + 1, __ldg(arguments.output));
}

}  // namespace

Kernel find_planted_kernel(const std::string& name) {
#define KERNEL(kernel) {#kernel, kernel}
  static const std::map<std::string, Kernel> kernels{
      KERNEL(copy),
      KERNEL(read_past_the_end),
      KERNEL(read_before_the_beginning),
      KERNEL(write_past_the_end),
      KERNEL(add_past_the_end),
      KERNEL(leave_the_last_one_unwritten),
      KERNEL(copy_vectors),
      KERNEL(read_without_a_check),
      KERNEL(write_without_a_check),
      KERNEL(read_from_null),
      KERNEL(use_up_the_stack),
      KERNEL(sum),
      KERNEL(sum_with_a_lane_missing),
      KERNEL(sum_without_a_lane),
      KERNEL(sum_while_a_lane_is_elsewhere),
      KERNEL(sum_while_a_lane_is_at_the_barrier),
      KERNEL(shuffle_with_a_width_of_three),
      KERNEL(shuffle_after_others_exited),
      KERNEL(shuffle_from_a_lane_that_exited),
      KERNEL(exchange_unsynchronised),
      KERNEL(exchange),
      KERNEL(exchange_in_the_block_unsynchronised),
      KERNEL(exchange_in_the_block),
      KERNEL(exchange_shared),
      KERNEL(exchange_shared_unsynchronised),
      KERNEL(write_beyond_shared_memory),
      KERNEL(count_threads),
      KERNEL(count_threads_without_atomics),
      KERNEL(read_only_what_is_written),
  };
#undef KERNEL
  const auto found = kernels.find(name);
  return found == kernels.end() ? nullptr : found->second;
}

cudaError_t launch_kernel(Kernel kernel, Arguments arguments, dim3 grid, dim3 block) {
  void* parameters[] = {&arguments};
  return cudaLaunchKernel(kernel, grid, block, parameters);
}

}  // namespace lite_detr::harness
