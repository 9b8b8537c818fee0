// Groups of lanes within a warp, each working for one query and head.
//
// All lanes of a warp stay together to the end of a kernel, even those without work, so that every
// shuffle names all of them: a mask that is not known at compile time costs a synchronisation each.
#pragma once

#include <cuda_runtime.h>

#include "tuning.h"

namespace lite_detr::cuda {

constexpr unsigned kWholeWarp = 0xffffffff;

// The query and head of a group of lanes. A block holds consecutive queries of one head of one
// image; groups beyond the last query repeat it, and write nothing.
template <int kLanes>
struct Group {
  int32_t query;  // of B * Q
  int32_t item;   // of B * Q * M
  int32_t lane;   // of kLanes
  bool exists;

  __device__ __forceinline__ explicit Group(const KernelGeometry& geometry) {
    const int32_t number = blockIdx.x * (blockDim.x / kLanes) + threadIdx.x / kLanes;
    exists = number < geometry.queries;
    const int32_t last = geometry.queries - 1;
    query = blockIdx.z * geometry.queries + (exists ? number : last);
    item = query * geometry.heads + blockIdx.y;
    lane = threadIdx.x % kLanes;
  }
};

struct Grid {
  dim3 blocks;
  int threads;  // of each
};

// The grid of a launch.
inline Grid grid(const Layout& layout, const KernelGeometry& geometry) {
  const auto of_threads = [&](int threads) {
    const int32_t groups = threads / layout.lanes;
    const int32_t blocks = geometry.queries / groups + (geometry.queries % groups != 0);
    return Grid{dim3(blocks, geometry.heads, geometry.batch), threads};
  };
  const Grid large = of_threads(layout.threads);
  const bool is_small =
      int64_t(large.blocks.x) * large.blocks.y * large.blocks.z < kBlocksOfASmallGrid;
  return is_small ? of_threads(kSmallBlock) : large;
}

// Keeps a value in a register. Otherwise the compiler recomputes addresses for each load, a dozen
// instructions instead of one, and loads constants ahead of loops that need the registers.
template <typename V>
__device__ __forceinline__ V pin(V value) {
#if defined(__CUDACC__)
  if constexpr (sizeof(V) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
#endif
  return value;
}

// The address of a token's row, in one instruction. Left to the compiler, the stride becomes a 64-bit
// number ahead of the loop, and the product four instructions.
__device__ __forceinline__ const char* token_row(
    const char* first, int32_t token, int32_t stride) {
#if defined(__CUDACC__)
  const char* row;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(row) : "r"(token), "r"(stride), "l"(first));
  return row;
#else
  return first + int64_t(token) * stride;
#endif
}

// Tells the compiler what pin() hides, that an address is in device memory: an atomic addition is
// then one instruction, instead of a case for each kind of memory.
template <typename V>
__device__ __forceinline__ V* in_device_memory(V* address) {
#if defined(__CUDACC__)
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

// An array that the threads of a block share, one for each kernel. Nothing is in it at first.
template <typename V, int kCount>
__device__ __forceinline__ V* shared_array() {
#if defined(__CUDACC__)
  __shared__ V array[kCount];
  return array;
#else
  return static_cast<V*>(harness::shared_memory(kCount * sizeof(V)));
#endif
}

// The first row of the block's head and image.
template <typename T>
__device__ __forceinline__ T* first_row(const TokenRows<T>& rows) {
  const auto* bytes = reinterpret_cast<const char*>(rows.data) +
      blockIdx.z * rows.batch_stride + blockIdx.y * rows.head_stride;
  return reinterpret_cast<T*>(const_cast<char*>(bytes));
}

// The value of one lane, for all lanes of the group.
template <int kLanes, typename V>
__device__ __forceinline__ V share(V value, int lane) {
  return __shfl_sync(kWholeWarp, value, lane, kLanes);
}

// The sum over the lanes of a group, for all of them.
template <int kLanes, typename A>
__device__ __forceinline__ A sum_lanes(A value) {
#pragma unroll
  for (int span = kLanes / 2; span > 0; span /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, span, kLanes);
  }
  return value;
}

// The maximum over the lanes of a group, for all of them.
template <int kLanes, typename A>
__device__ __forceinline__ A max_lanes(A value) {
#pragma unroll
  for (int span = kLanes / 2; span > 0; span /= 2) {
    value = max(value, __shfl_xor_sync(kWholeWarp, value, span, kLanes));
  }
  return value;
}

// Two sums over the lanes of a group, for all of them, in log2(kLanes) + 1 shuffles: even lanes add
// up one, odd lanes the other, and neighbours exchange the results.
template <int kLanes, typename A>
__device__ __forceinline__ void sum_lanes(A& a, A& b, int lane) {
  const bool odd = lane & 1;
  A sum = (odd ? b : a) + __shfl_xor_sync(kWholeWarp, odd ? a : b, 1, kLanes);
#pragma unroll
  for (int span = 2; span < kLanes; span *= 2) {
    sum += __shfl_xor_sync(kWholeWarp, sum, span, kLanes);
  }
  const A other = __shfl_xor_sync(kWholeWarp, sum, 1, kLanes);
  a = odd ? other : sum;
  b = odd ? sum : other;
}

// The sums of kCount numbers over the lanes of a group: lanes i, i + kCount, ... get number i's.
//
// By halving: lanes give away the numbers that are not theirs, which takes kCount - 1 shuffles, and
// then one for each doubling from kCount to kLanes. Single sums take kCount * log2(kLanes).
// Destroys the numbers.
template <int kLanes, int kCount, typename A>
__device__ __forceinline__ A sum_lanes_separately(A (&numbers)[kCount], int lane) {
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const A given = upper ? numbers[i] : numbers[i + half];
      const A kept = upper ? numbers[i + half] : numbers[i];
      numbers[i] = kept + __shfl_xor_sync(kWholeWarp, given, half, kLanes);
    }
  }
  A sum = numbers[0];
#pragma unroll
  for (int span = kCount; span < kLanes; span *= 2) {
    sum += __shfl_xor_sync(kWholeWarp, sum, span, kLanes);
  }
  return sum;
}

}  // namespace lite_detr::cuda
