// Groups of lanes within a warp, each working for one query and head.
//
// All lanes of a warp stay together to the end of a kernel, even those without work, so that every
// shuffle names all of them: a mask that is not known at compile time costs a synchronisation each.
#pragma once

#include <cuda_runtime.h>

#include "tuning.h"

namespace lite_detr::cuda {

constexpr unsigned kWholeWarp = 0xffffffff;

// A rectangle of a map, with a cell for each group of a block; its sides are powers of two.
struct Tile {
  int32_t height_bits;
  int32_t width_bits;

  __host__ __device__ constexpr explicit Tile(int groups) : height_bits(0), width_bits(0) {
    while (groups >> (height_bits + width_bits) > 1) {
      ++(height_bits < width_bits ? height_bits : width_bits);
    }
  }

  __host__ __device__ __forceinline__ int32_t across(int32_t width) const {
    return (width + (1 << width_bits) - 1) >> width_bits;
  }
  __host__ __device__ __forceinline__ int32_t down(int32_t height) const {
    return (height + (1 << height_bits) - 1) >> height_bits;
  }
};

// The query and head of a group of lanes. A block holds queries of one head of one image: a tile of
// a map if they are tokens, which sample more of the same rows than a strip does; else consecutive
// ones. Groups beyond the last query, or the map's border, repeat another one, and write nothing.
template <int kLanes, int kThreads>
struct Group {
  int32_t query;  // of B * Q
  int32_t item;   // of B * Q * M
  int32_t lane;   // of kLanes
  bool exists;

  __device__ __forceinline__ explicit Group(const KernelGeometry& geometry) {
    const int32_t group = threadIdx.x / kLanes;
    const bool is_small = kThreads != kSmallBlock && blockDim.x == kSmallBlock;
    int32_t number;
    if (geometry.query_level < geometry.levels) {
      constexpr Tile kLarge(kThreads / kLanes), kSmall(kSmallBlock / kLanes);
      number = token_of_tile(geometry, is_small ? kSmall : kLarge, group);
    } else {
      number = blockIdx.x * (blockDim.x / kLanes) + group;
      exists = number < geometry.queries;
      number = exists ? number : geometry.queries - 1;
    }
    query = blockIdx.z * geometry.queries + number;
    item = query * geometry.heads + blockIdx.y;
    lane = threadIdx.x % kLanes;
  }

 private:
  __device__ __forceinline__ int32_t
  token_of_tile(const KernelGeometry& geometry, const Tile& tile, int32_t group) {
    int32_t level = geometry.query_level, number = blockIdx.x, first = 0, across;
#pragma unroll 1
    while (true) {
      across = tile.across(geometry.width[level]);
      const int32_t tiles = across * tile.down(geometry.height[level]);
      if (number < tiles) break;
      number -= tiles;
      first += geometry.width[level] * geometry.height[level];
      ++level;
    }
    const int32_t width = geometry.width[level], height = geometry.height[level];
    const int32_t row_of_tiles = uint32_t(number) / uint32_t(across);
    const int32_t row = (row_of_tiles << tile.height_bits) + (group >> tile.width_bits);
    const int32_t column = ((number - row_of_tiles * across) << tile.width_bits) +
        (group & ((1 << tile.width_bits) - 1));
    exists = row < height && column < width;
    return first + min(row, height - 1) * width + min(column, width - 1);
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
    int32_t blocks = geometry.queries / groups + (geometry.queries % groups != 0);
    if (geometry.query_level < geometry.levels) {
      const Tile tile(groups);
      blocks = 0;
      for (int32_t level = geometry.query_level; level < geometry.levels; ++level) {
        blocks += tile.across(geometry.width[level]) * tile.down(geometry.height[level]);
      }
    }
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
