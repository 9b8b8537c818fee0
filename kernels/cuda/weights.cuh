// The weights of a query's points: given, or a softmax of logits.
#pragma once

#include <cfloat>

#include "lanes.cuh"
#include "vectors.cuh"

namespace lite_detr::cuda {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// By powers of two, which the hardware computes.
__device__ __forceinline__ float exponential(float x) { return exp2f(x * float(kLog2E)); }
__device__ __forceinline__ double exponential(double x) { return exp2(x * kLog2E); }
__device__ __forceinline__ float logarithm(float x) { return log2f(x) * float(kLn2); }
__device__ __forceinline__ double logarithm(double x) { return log2(x) * kLn2; }

// Below every logit, and finite: logits that are all -inf must not compute inf - inf.
template <typename A>
constexpr A kLowest = sizeof(A) == sizeof(double) ? A(-DBL_MAX) : A(-FLT_MAX);

// Weights of an item's points, which lanes read one by one.
template <int kLanes, typename T, bool kLogits>
class PointWeights {
 public:
  using A = compute_t<T>;

  // `weights` are the item's, or its logits.
  __device__ __forceinline__ PointWeights(const T* weights, int32_t points, int32_t lane)
      : weights_(weights) {
    if constexpr (kLogits) {
#pragma unroll 1
      for (int32_t point = lane; point < points; point += kLanes) {
        maximum_ = max(maximum_, load_number(weights + point));
      }
      maximum_ = max_lanes<kLanes>(maximum_);
      A total = 0;
#pragma unroll 1
      for (int32_t point = lane; point < points; point += kLanes) {
        total += exponential(load_number(weights + point) - maximum_);
      }
      share_ = A(1) / sum_lanes<kLanes>(total);
    }
  }

  __device__ __forceinline__ A at(int32_t point) const {
    const A number = load_number(weights_ + point);
    if constexpr (kLogits) return exponential(number - maximum_) * share_;
    return number;
  }

 private:
  const T* weights_;
  A maximum_ = kLowest<A>;
  A share_ = 1;
};

}  // namespace lite_detr::cuda
