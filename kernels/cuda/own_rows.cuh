// The rows that a query has for itself: its channels, its output, the gradient of it.
#pragma once

#include "points.cuh"

namespace lite_detr::cuda {

// A lane's channels of a row, as many as of sampled rows.
//
// One vector of 32-bit numbers stays in registers. More would leave too few for the sums: they are
// loaded where they are used, from a cache.
template <typename T, int kWidth, int kLanes, int kVectors>
class OwnRow {
 public:
  using Row = Channels<compute_t<T>, kWidth>;
  static constexpr bool kHeld = kVectors == 1 && !kIs64Bit<T>;

  __device__ __forceinline__ OwnRow(const T* rows, int32_t item, int32_t lane)
      : rows_(rows), item_(item), channel_(lane * kWidth) {
    if constexpr (kHeld) held_ = load_vector(0);
  }

  __device__ __forceinline__ Row at(int vector) const {
    if constexpr (kHeld) {
      return held_;
    } else {
      return load_vector(vector);
    }
  }

 private:
  __device__ __forceinline__ Row load_vector(int vector) const {
    const T* row = rows_ + int64_t(pin(item_)) * (kLanes * kWidth * kVectors) + channel_;
    return load<kWidth>(row + vector * kLanes * kWidth);
  }

  const T* rows_;
  int32_t item_;
  int32_t channel_;
  Row held_;
};

}  // namespace lite_detr::cuda
