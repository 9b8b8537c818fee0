// Adding to the gradients of rows that other queries add to as well.
#pragma once

#include "own_rows.cuh"

namespace lite_detr::cuda {

// Neighbouring numbers that one instruction adds.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
template <typename A>
constexpr int kAddedAtOnce = sizeof(A) == sizeof(float) ? 4 : 1;
#else
template <typename A>
constexpr int kAddedAtOnce = 1;
#endif

// A template, as there is no such addition to look up before 9.0.
template <typename V>
__device__ __forceinline__ void add_at_once(V* target, V sum) {
  atomicAdd(target, sum);
}

// Which channels a lane adds to.
//
// Where four numbers are added at once, a lane adds to those that it loads. Elsewhere the lanes of
// a group take turns, channel by channel, so that each addition of a group is to neighbouring
// numbers: four times fewer sectors of the L2 cache than where lanes lie four channels apart.
template <typename A, int kWidth, int kLanes>
struct Turns {
  static constexpr int kRun = kAddedAtOnce<A>;
  static constexpr bool kAsLoaded = kRun == kWidth;

  // From a lane's first channel to that of its number i of a vector.
  __device__ __forceinline__ static constexpr int offset(int vector, int i) {
    return (vector * kWidth + i) / kRun * kRun * kLanes + i % kRun;
  }
};

// A row of the query's own, in the channels that a lane adds to. It stays in registers where they
// are those of the row as loaded, or where the kernel has registers for both (kMayHold).
template <typename T, int kWidth, int kLanes, int kVectors, bool kMayHold>
class AddedRow {
 public:
  using Loaded = OwnRow<T, kWidth, kLanes, kVectors>;
  using Row = typename Loaded::Row;

  __device__ __forceinline__ AddedRow(
      const Loaded& loaded, const T* rows, int32_t item, int32_t lane)
      : loaded_(loaded), rows_(rows), item_(item), channel_(lane * Own::kRun) {
    if constexpr (kHeld) held_ = load_vector(0);
  }

  __device__ __forceinline__ Row at(int vector) const {
    if constexpr (Own::kAsLoaded) {
      return loaded_.at(vector);
    } else if constexpr (kHeld) {
      return held_;
    } else {
      return load_vector(vector);
    }
  }

 private:
  using Own = Turns<compute_t<T>, kWidth, kLanes>;
  static constexpr bool kHeld = kMayHold && Loaded::kHeld && !Own::kAsLoaded;

  __device__ __forceinline__ Row load_vector(int vector) const {
    const T* row = rows_ + int64_t(pin(item_)) * (kLanes * kWidth * kVectors) + channel_;
    Row channels;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) channels.at[i] = load_number(row + Own::offset(vector, i));
    return channels;
  }

  const Loaded& loaded_;
  const T* rows_;
  int32_t item_;
  int32_t channel_;
  Row held_;
};

// The gradient of the rows of one head of one image.
template <typename A, int kWidth, int kLanes>
class AddedRows {
 public:
  __device__ __forceinline__ AddedRows(const Rows<A>& rows, int32_t lane)
      : first_(pin(reinterpret_cast<char*>(first_row(rows) + lane * Own::kRun))),
        stride_(rows.token_stride) {}

  // Adds factor * row, of an AddedRow, to what a corner of a point has; it must exist.
  __device__ __forceinline__ void add(
      const Point<A>& point, int corner, int32_t width, int vector, A factor,
      const Channels<A, kWidth>& row) const {
    A* target = in_device_memory(reinterpret_cast<A*>(
        first_ + int64_t(point.corner_token(corner, width)) * stride_));
#pragma unroll
    for (int i = 0; i < kWidth; i += Own::kRun) {
      if constexpr (Own::kRun == 4) {
        add_at_once(
            reinterpret_cast<float4*>(target + Own::offset(vector, i)),
            make_float4(
                factor * row.at[i], factor * row.at[i + 1], factor * row.at[i + 2],
                factor * row.at[i + 3]));
      } else {
        atomicAdd(target + Own::offset(vector, i), factor * row.at[i]);
      }
    }
  }

 private:
  using Own = Turns<A, kWidth, kLanes>;

  char* first_;
  int32_t stride_;
};

}  // namespace lite_detr::cuda
