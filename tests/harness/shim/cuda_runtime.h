// What device code needs of CUDA. The harness checks every access to memory, and lets shuffles and
// barriers wait as they must; this file gives these functions CUDA's names.
#pragma once

#include <math.h>  // which, unlike <cmath>, has the overloads for float outside std

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../access.h"
#include "../launch.h"
#include "../synchronisation.h"
#include "cuda_runtime_api.h"
#include "vector_functions.h"

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

namespace lite_detr::harness {

// What one instruction can access.
template <typename T>
constexpr bool kIsWord = std::is_trivially_copyable_v<T> &&
    (sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);

template <typename T>
T load(const T* address, Access access) {
  static_assert(kIsWord<T>);
  T value;
  std::memcpy(&value, checked(address, sizeof(T), access), sizeof(T));
  return value;
}

template <typename T>
void store(T* address, const T& value) {
  static_assert(kIsWord<T>);
  std::memcpy(checked(address, sizeof(T), Access::store), &value, sizeof(T));
}

// Adds to `count` neighbouring numbers, and returns what they were. Nothing happens between reading
// and writing, as threads only change at the beginning of an access.
template <typename T, typename Number>
T atomic_add(T* address, const T& value) {
  constexpr int count = sizeof(T) / sizeof(Number);
  void* place = checked(address, sizeof(T), Access::atomic);
  Number old[count], sums[count];
  std::memcpy(old, place, sizeof(T));
  std::memcpy(sums, &value, sizeof(T));
  for (int i = 0; i < count; ++i) sums[i] += old[i];
  std::memcpy(place, sums, sizeof(T));
  T result;
  std::memcpy(&result, old, sizeof(T));
  return result;
}

template <typename T>
T shuffle(Intrinsic intrinsic, unsigned int mask, T value, int argument, int width) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange({intrinsic, mask, argument, width, sizeof(T), bits});
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Keeps a type from being deduced: the pointer decides what is stored.
template <typename T>
struct Same {
  using type = T;
};

}  // namespace lite_detr::harness

template <typename T>
T __ldg(const T* address) {
  return lite_detr::harness::load(address, lite_detr::harness::Access::read_only_load);
}
template <typename T>
T __ldcg(const T* address) {
  return lite_detr::harness::load(address, lite_detr::harness::Access::load);
}
template <typename T>
void __stwb(T* address, typename lite_detr::harness::Same<T>::type value) {
  lite_detr::harness::store(address, value);
}

inline float atomicAdd(float* address, float value) {
  return lite_detr::harness::atomic_add<float, float>(address, value);
}
inline double atomicAdd(double* address, double value) {
  return lite_detr::harness::atomic_add<double, double>(address, value);
}
#if __CUDA_ARCH__ >= 900
inline float4 atomicAdd(float4* address, float4 value) {
  return lite_detr::harness::atomic_add<float4, float>(address, value);
}
#endif

template <typename T>
T __shfl_sync(unsigned int mask, T value, int lane, int width = warpSize) {
  return lite_detr::harness::shuffle(
      lite_detr::harness::Intrinsic::shuffle, mask, value, lane, width);
}
template <typename T>
T __shfl_xor_sync(unsigned int mask, T value, int lane_mask, int width = warpSize) {
  return lite_detr::harness::shuffle(
      lite_detr::harness::Intrinsic::shuffle_xor, mask, value, lane_mask, width);
}
inline void __syncwarp(unsigned int mask = 0xffffffff) {
  lite_detr::harness::exchange({lite_detr::harness::Intrinsic::sync_warp, mask, 0, warpSize, 0, 0});
}
inline int __all_sync(unsigned int mask, int predicate) {
  return int(lite_detr::harness::exchange(
      {lite_detr::harness::Intrinsic::vote_all, mask, 0, warpSize, 0, uint64_t(predicate != 0)}));
}
inline void __syncthreads() { lite_detr::harness::sync_block(); }

// As CUDA's: also for two different types, and by the C functions if one is a floating-point type.
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return fmin(T(a), T(b));
  } else {
    return T(a) < T(b) ? T(a) : T(b);
  }
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return fmax(T(a), T(b));
  } else {
    return T(a) < T(b) ? T(b) : T(a);
  }
}

inline float __uint_as_float(unsigned int bits) {
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}
inline unsigned int __float_as_uint(float number) {
  unsigned int bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return bits;
}

// Runs every thread of every block before it returns.
template <typename... Parameters>
cudaError_t cudaLaunchKernel(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments,
    size_t shared_bytes = 0, cudaStream_t = nullptr) {
  return lite_detr::harness::launch(
      grid, block, shared_bytes, lite_detr::harness::bind_arguments(kernel, arguments));
}
