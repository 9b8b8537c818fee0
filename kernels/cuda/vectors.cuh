// Channels in the registers of a lane, and how they are loaded and stored.
//
// All global memory is read by __ldg and written by __stwb: no kernel reads what it writes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace lite_detr::cuda {

// kWidth neighbouring channels, in the type of arithmetic.
template <typename A, int kWidth>
struct Channels {
  A at[kWidth];
};

// sum += factor * channels
template <typename A, int kWidth>
__device__ __forceinline__ void add_scaled(
    Channels<A, kWidth>& sum, A factor, const Channels<A, kWidth>& channels) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum.at[i] += factor * channels.at[i];
}

template <typename A, int kWidth>
__device__ __forceinline__ Channels<A, kWidth> scale(
    A factor, const Channels<A, kWidth>& channels) {
  Channels<A, kWidth> scaled;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) scaled.at[i] = factor * channels.at[i];
  return scaled;
}

template <typename A, int kWidth>
__device__ __forceinline__ A dot(const Channels<A, kWidth>& a, const Channels<A, kWidth>& b) {
  A sum = a.at[0] * b.at[0];
#pragma unroll
  for (int i = 1; i < kWidth; ++i) sum += a.at[i] * b.at[i];
  return sum;
}

// Two 16-bit numbers in one register.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack<Float16>(uint32_t pair) {
  __half2 halves;
  std::memcpy(&halves, &pair, sizeof(pair));
  return __half22float2(halves);
}
template <>
__device__ __forceinline__ float2 unpack<BFloat16>(uint32_t pair) {
  __nv_bfloat162 halves;
  std::memcpy(&halves, &pair, sizeof(pair));
  return __bfloat1622float2(halves);
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float2 numbers);
template <>
__device__ __forceinline__ uint32_t pack<Float16>(float2 numbers) {
  const __half2 halves = __float22half2_rn(numbers);
  uint32_t pair;
  std::memcpy(&pair, &halves, sizeof(pair));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float2 numbers) {
  const __nv_bfloat162 halves = __float22bfloat162_rn(numbers);
  uint32_t pair;
  std::memcpy(&pair, &halves, sizeof(pair));
  return pair;
}

// What one instruction loads or stores: 16 bytes or 8.
template <int kBytes>
using Vector = std::conditional_t<kBytes == 16, uint4, uint2>;

template <int kWidth, typename T>
__device__ __forceinline__ Channels<compute_t<T>, kWidth> load(const T* source) {
  using V = Vector<kWidth * sizeof(T)>;
  static_assert(sizeof(V) == kWidth * sizeof(T), "a vector holds kWidth numbers");
  const V vector = __ldg(reinterpret_cast<const V*>(source));
  Channels<compute_t<T>, kWidth> channels;
  if constexpr (sizeof(T) == 2) {
    uint32_t pairs[kWidth / 2];
    std::memcpy(pairs, &vector, sizeof(vector));
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      const float2 numbers = unpack<T>(pairs[i]);
      channels.at[2 * i] = numbers.x;
      channels.at[2 * i + 1] = numbers.y;
    }
  } else {
    std::memcpy(channels.at, &vector, sizeof(vector));
  }
  return channels;
}

template <int kWidth, typename T>
__device__ __forceinline__ void store(T* target, const Channels<compute_t<T>, kWidth>& channels) {
  using V = Vector<kWidth * sizeof(T)>;
  V vector;
  if constexpr (sizeof(T) == 2) {
    uint32_t pairs[kWidth / 2];
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      pairs[i] = pack<T>(make_float2(channels.at[2 * i], channels.at[2 * i + 1]));
    }
    std::memcpy(&vector, pairs, sizeof(vector));
  } else {
    std::memcpy(&vector, channels.at, sizeof(vector));
  }
  __stwb(reinterpret_cast<V*>(target), vector);
}

// Stores a lane's channels of row `item` of contiguous rows.
template <int kLanes, typename T, int kWidth, int kVectors>
__device__ __forceinline__ void store_row(
    T* rows, int32_t item, int32_t lane,
    const Channels<compute_t<T>, kWidth> (&channels)[kVectors]) {
  T* row = rows + int64_t(item) * (kLanes * kWidth * kVectors) + lane * kWidth;
#pragma unroll
  for (int vector = 0; vector < kVectors; ++vector) {
    store<kWidth>(row + vector * kLanes * kWidth, channels[vector]);
  }
}

// Single numbers.
__device__ __forceinline__ float load_number(const float* source) { return __ldg(source); }
__device__ __forceinline__ double load_number(const double* source) { return __ldg(source); }
template <typename T>
__device__ __forceinline__ float load_number(const T* source) {
  return unpack<T>(__ldg(&source->bits)).x;
}

__device__ __forceinline__ void store_number(float* target, float number) {
  __stwb(target, number);
}
__device__ __forceinline__ void store_number(double* target, double number) {
  __stwb(target, number);
}
template <typename T>
__device__ __forceinline__ void store_number(T* target, float number) {
  __stwb(&target->bits, uint16_t(pack<T>(make_float2(number, 0.0f))));
}

// A pair (x, y) of an array of pairs.
__device__ __forceinline__ float2 load_pair(const float* pairs, int index) {
  return __ldg(reinterpret_cast<const float2*>(pairs) + index);
}
__device__ __forceinline__ double2 load_pair(const double* pairs, int index) {
  return __ldg(reinterpret_cast<const double2*>(pairs) + index);
}
template <typename T>
__device__ __forceinline__ float2 load_pair(const T* pairs, int index) {
  return unpack<T>(__ldg(reinterpret_cast<const uint32_t*>(pairs) + index));
}
__device__ __forceinline__ void store_pair(float* pairs, int index, float x, float y) {
  __stwb(reinterpret_cast<float2*>(pairs) + index, make_float2(x, y));
}
__device__ __forceinline__ void store_pair(double* pairs, int index, double x, double y) {
  __stwb(reinterpret_cast<double2*>(pairs) + index, make_double2(x, y));
}

template <typename T>
__device__ __forceinline__ void store_pair(T* pairs, int index, float x, float y) {
  __stwb(reinterpret_cast<uint32_t*>(pairs) + index, pack<T>(make_float2(x, y)));
}

}  // namespace lite_detr::cuda
