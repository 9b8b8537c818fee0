// Adds to the gradients of token rows, to which other queries add as well.
#pragma once

#include "points.cuh"

namespace lite_detr::cuda {

// How many neighbouring numbers one instruction adds to. CUDA knows it since 12.1; a compiler without
// such a number is the emulator's.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && \
    (!defined(__CUDACC_VER_MAJOR__) || \
     100 * __CUDACC_VER_MAJOR__ + __CUDACC_VER_MINOR__ >= 1201)
template <typename A>
constexpr int kAddedAtOnce = sizeof(A) == sizeof(float) ? 4 : 1;
#else
template <typename A>
constexpr int kAddedAtOnce = 1;
#endif

// A template, as this addition does not exist before 9.0, nor in CUDA 12.0.
template <typename V>
__device__ __forceinline__ void add_at_once(V* target, V sum) {
  atomicAdd(target, sum);
}

// Which channels a lane adds to.
//
// If four numbers are added at once, a lane adds to those that it loads. Otherwise the lanes of a
// group take turns, channel by channel, so that each addition of a group goes to neighbouring
// numbers: four times fewer sectors of the L2 cache than with lanes that are four channels apart.
template <typename A, int kWidth, int kLanes>
struct LaneOrder {
  static constexpr int kRun = kAddedAtOnce<A>;
  static constexpr bool kAsLoaded = kRun == kWidth;

  // The distance from a lane's first channel to number i of a vector.
  __device__ __forceinline__ static constexpr int offset(int vector, int i) {
    return (vector * kWidth + i) / kRun * kRun * kLanes + i % kRun;
  }
};

// A row of the query that is to be added to token rows, in the channels that a lane adds to. It
// stays in registers if these are the channels of the row as loaded, or if the kernel has registers
// for both (kMayHold).
template <typename T, int kWidth, int kLanes, int kVectors, bool kMayHold>
class QueryAddend {
 public:
  using Loaded = QueryRow<T, kWidth, kLanes, kVectors>;
  using Part = typename Loaded::Part;

  __device__ __forceinline__ QueryAddend(
      const Loaded& loaded, const T* rows, int32_t item, int32_t lane)
      : loaded_(loaded), rows_(rows), item_(item), channel_(lane * Lane::kRun) {
    if constexpr (kHeld) held_ = load_vector(0);
  }

  __device__ __forceinline__ Part at(int vector) const {
    if constexpr (Lane::kAsLoaded) {
      return loaded_.at(vector);
    } else if constexpr (kHeld) {
      return held_;
    } else {
      return load_vector(vector);
    }
  }

 private:
  using Lane = LaneOrder<compute_t<T>, kWidth, kLanes>;
  static constexpr bool kHeld = kMayHold && Loaded::kHeld && !Lane::kAsLoaded;

  __device__ __forceinline__ Part load_vector(int vector) const {
    const T* row = rows_ + int64_t(pin(item_)) * (kLanes * kWidth * kVectors) + channel_;
    Part channels;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) channels.at[i] = load_number(row + Lane::offset(vector, i));
    return channels;
  }

  const Loaded& loaded_;
  const T* rows_;
  int32_t item_;
  int32_t channel_;
  Part held_;
};

// Adds to the gradient of the token rows of one head and image.
template <typename A, int kWidth, int kLanes>
class TokenAdder {
 public:
  __device__ __forceinline__ TokenAdder(const TokenRows<A>& rows, int32_t lane)
      : first_(pin(reinterpret_cast<char*>(first_row(rows) + lane * Lane::kRun))),
        stride_(rows.token_stride) {}

  // Adds factor * row, a part of a QueryAddend, at a corner of a point, which must exist.
  __device__ __forceinline__ void add(
      const Point<A>& point, int corner, int32_t width, int vector, A factor,
      const Channels<A, kWidth>& row) const {
    A* target = in_device_memory(reinterpret_cast<A*>(
        first_ + int64_t(point.corner_token(corner, width)) * stride_));
#pragma unroll
    for (int i = 0; i < kWidth; i += Lane::kRun) {
      if constexpr (Lane::kRun == 4) {
        add_at_once(
            reinterpret_cast<float4*>(target + Lane::offset(vector, i)),
            make_float4(
                factor * row.at[i], factor * row.at[i + 1], factor * row.at[i + 2],
                factor * row.at[i + 3]));
      } else {
        atomicAdd(target + Lane::offset(vector, i), factor * row.at[i]);
      }
    }
  }

 private:
  using Lane = LaneOrder<A, kWidth, kLanes>;

  char* first_;
  int32_t stride_;
};

}  // namespace lite_detr::cuda
