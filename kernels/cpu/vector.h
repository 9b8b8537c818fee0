// Vectors as wide as the instruction set that the including file is compiled for, by the extension
// that GCC and Clang share: +, * and < work on whole vectors.
//
// The including file defines LITE_DETR_ISA, the namespace to compile into, and
// LITE_DETR_VECTOR_BYTES.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>
#if LITE_DETR_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

#include "kernels.h"

#define LITE_DETR_INLINE inline __attribute__((always_inline))

namespace lite_detr::cpu::LITE_DETR_ISA {

template <typename A>
constexpr int kLanes = LITE_DETR_VECTOR_BYTES / int(sizeof(A));

template <typename E, int N>
struct VectorOf {
  typedef E type __attribute__((vector_size(sizeof(E) * N)));
};
template <typename A>
using Vec = typename VectorOf<A, kLanes<A>>::type;
template <typename E>
using FloatLanes = typename VectorOf<E, kLanes<float>>::type;
// As many 32-bit integers as a vector has lanes.
template <typename A>
using Ints = typename VectorOf<int32_t, kLanes<A>>::type;

template <typename V>
LITE_DETR_INLINE V load_bytes(const void* source) {
  V vector;
  std::memcpy(&vector, source, sizeof(V));
  return vector;
}

LITE_DETR_INLINE Vec<float> load(const float* source) { return load_bytes<Vec<float>>(source); }
LITE_DETR_INLINE Vec<double> load(const double* source) { return load_bytes<Vec<double>>(source); }
LITE_DETR_INLINE Vec<float> load(const BFloat16* source) {
  const auto bits = load_bytes<FloatLanes<uint16_t>>(source);
  return (Vec<float>)(__builtin_convertvector(bits, FloatLanes<uint32_t>) << 16);
}

LITE_DETR_INLINE void store(float* target, Vec<float> v) { std::memcpy(target, &v, sizeof(v)); }
LITE_DETR_INLINE void store(double* target, Vec<double> v) { std::memcpy(target, &v, sizeof(v)); }
// The bits of bfloat16 numbers, each in an integer.
LITE_DETR_INLINE FloatLanes<uint32_t> round_to_bfloat16(Vec<float> v) {
  const auto bits = (FloatLanes<uint32_t>)v;
  // Rounds to nearest, ties to even; a NaN must not become infinity.
  const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto is_nan = (FloatLanes<uint32_t>)(v != v);
  return (rounded & ~is_nan) | (0x7fc0 & is_nan);
}
LITE_DETR_INLINE void store(BFloat16* target, Vec<float> v) {
  const auto narrow = __builtin_convertvector(round_to_bfloat16(v), FloatLanes<uint16_t>);
  std::memcpy(target, &narrow, sizeof(narrow));
}

#if LITE_DETR_VECTOR_BYTES == 64
LITE_DETR_INLINE Vec<float> load(const Float16* source) {
  return (Vec<float>)_mm512_cvtph_ps(load_bytes<__m256i>(source));
}
LITE_DETR_INLINE void store(Float16* target, Vec<float> v) {
  const __m256i narrow = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(target, &narrow, sizeof(narrow));
}
#elif LITE_DETR_VECTOR_BYTES == 32
LITE_DETR_INLINE Vec<float> load(const Float16* source) {
  return (Vec<float>)_mm256_cvtph_ps(load_bytes<__m128i>(source));
}
LITE_DETR_INLINE void store(Float16* target, Vec<float> v) {
  const __m128i narrow = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(target, &narrow, sizeof(narrow));
}
#else
// By integers: without an instruction for it, compilers call a function for every number.
LITE_DETR_INLINE Vec<float> load(const Float16* source) {
  const auto bits = __builtin_convertvector(
      load_bytes<FloatLanes<uint16_t>>(source), FloatLanes<uint32_t>);
  // The exponents' biases differ by 112; the product is right for subnormal numbers, too.
  const auto magnitude = (Vec<float>)((bits & 0x7fff) << 13) * 0x1p112f;
  // Anything beyond the largest number is infinite or NaN.
  const auto special = (FloatLanes<uint32_t>)(magnitude > 65504.0f) & 0x7f800000;
  return (Vec<float>)((FloatLanes<uint32_t>)magnitude | special | ((bits & 0x8000) << 16));
}
LITE_DETR_INLINE void store(Float16* target, Vec<float> v) {
  for (int lane = 0; lane < kLanes<float>; ++lane) {
    const _Float16 number = static_cast<_Float16>(v[lane]);
    std::memcpy(target + lane, &number, sizeof(number));
  }
}
#endif

// Copies kGroup numbers of a table of `count`, at `indices` + `shift`. A table that fits a register
// is permuted there, which is faster than the instructions that gather.
LITE_DETR_INLINE void look_up(
    const float* table, int count, const int32_t* indices, int32_t shift, float* target) {
#if LITE_DETR_VECTOR_BYTES == 64
  if (count <= 16) {
    const __m512 numbers = _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), table);
    const __m512i lanes = _mm512_add_epi32(load_bytes<__m512i>(indices), _mm512_set1_epi32(shift));
    // With a mask, as GCC warns of what the plain one leaves undefined on purpose.
    _mm512_storeu_ps(target, _mm512_maskz_permutexvar_ps(0xffff, lanes, numbers));
    return;
  }
#elif LITE_DETR_VECTOR_BYTES == 32
  if (count <= 8) {
    const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i exist = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), places);
    const __m256 numbers = _mm256_maskload_ps(table, exist);
    for (int i = 0; i < kGroup; i += 8) {
      const __m256i lanes =
          _mm256_add_epi32(load_bytes<__m256i>(indices + i), _mm256_set1_epi32(shift));
      _mm256_storeu_ps(target + i, _mm256_permutevar8x32_ps(numbers, lanes));
    }
    return;
  }
#endif
  for (int i = 0; i < kGroup; ++i) target[i] = table[indices[i] + shift];
}
LITE_DETR_INLINE void look_up(
    const double* table, int, const int32_t* indices, int32_t shift, double* target) {
  for (int i = 0; i < kGroup; ++i) target[i] = table[indices[i] + shift];
}

template <typename A>
LITE_DETR_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}

// Every second lane of a and b, from the first one or the second one on.
template <int kFirst, typename V, int... kLane>
LITE_DETR_INLINE V every_second(V a, V b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (2 * kLane + kFirst)...);
}

// Adds lanes of a and b pairwise: lane i becomes x[i] + x[i ^ kSpan] of x = (i & kSpan ? b : a).
template <int kSpan, typename V, int... kLane>
LITE_DETR_INLINE V fold(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  const V kept = __builtin_shufflevector(a, b, (kLane & kSpan ? kCount + kLane : kLane)...);
  const V moved = __builtin_shufflevector(
      a, b, ((kLane & kSpan ? kCount + kLane : kLane) ^ kSpan)...);
  return kept + moved;
}

template <int kSpan, typename A>
LITE_DETR_INLINE void fold_all(Vec<A>* vectors) {
  if constexpr (kSpan > 0) {
    for (int i = 0; i < kSpan; ++i) {
      vectors[i] = fold<kSpan>(
          vectors[i], vectors[i + kSpan], std::make_integer_sequence<int, kLanes<A>>());
    }
    fold_all<kSpan / 2, A>(vectors);
  }
}

// The sums over the lanes of kGroup vectors, by halving: about three instructions for each vector,
// where a sum for each takes a dozen. Destroys the vectors.
template <typename A>
LITE_DETR_INLINE void sum_lanes(Vec<A>* vectors, A* sums) {
  for (int first = 0; first < kGroup; first += kLanes<A>) {
    fold_all<kLanes<A> / 2, A>(vectors + first);
    store(sums + first, vectors[first]);
  }
}

// Lane i gets what lane i ^ kSpan has.
template <int kSpan, typename V, int... kLane>
LITE_DETR_INLINE V exchange(V vector, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(vector, vector, (kLane ^ kSpan)...);
}

// The sum and the maximum of one vector's lanes.
template <typename A, int kSpan = kLanes<A> / 2>
LITE_DETR_INLINE A sum_lanes(Vec<A> vector) {
  if constexpr (kSpan == 0) {
    return vector[0];
  } else {
    constexpr std::make_integer_sequence<int, kLanes<A>> lanes;
    return sum_lanes<A, kSpan / 2>(vector + exchange<kSpan>(vector, lanes));
  }
}

template <typename A, int kSpan = kLanes<A> / 2>
LITE_DETR_INLINE A max_lanes(Vec<A> vector) {
  if constexpr (kSpan == 0) {
    return vector[0];
  } else {
    constexpr std::make_integer_sequence<int, kLanes<A>> lanes;
    const Vec<A> moved = exchange<kSpan>(vector, lanes);
    return max_lanes<A, kSpan / 2>(vector > moved ? vector : moved);
  }
}

LITE_DETR_INLINE float logarithm(float x) { return __builtin_logf(x); }
LITE_DETR_INLINE double logarithm(double x) { return __builtin_log(x); }

LITE_DETR_INLINE Vec<double> exponential(Vec<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_exp(x[lane]);
  return x;
}

// exp to about 1e-7: 2^n * p(r) with x = n ln 2 + r. A softmax needs x <= 0; x is clamped to 88.
LITE_DETR_INLINE Vec<float> exponential(Vec<float> x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const Vec<float> lowest = broadcast(-87.0f), highest = broadcast(88.0f);
  // Below -87 the result is subnormal, and taken as zero. NaN has no integer part: see the end.
  const Vec<float> above = x > lowest ? x : lowest;
  const Vec<float> bounded = above < highest ? above : highest;
  const Vec<float> shifted = bounded * kLog2E;
  const Vec<float> half = shifted < 0 ? broadcast(-0.5f) : broadcast(0.5f);
  const auto n = __builtin_convertvector(shifted + half, FloatLanes<int32_t>);
  const Vec<float> whole = __builtin_convertvector(n, Vec<float>);
  const Vec<float> r = (bounded - whole * kLn2High) - whole * kLn2Low;
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Vec<float> result = p * (Vec<float>)((n + 127) << 23);
  const Vec<float> positive = x < lowest ? Vec<float>{} : result;
  return x == x ? positive : x;
}

LITE_DETR_INLINE float exponential(float x) { return exponential(broadcast(x))[0]; }
LITE_DETR_INLINE double exponential(double x) { return __builtin_exp(x); }

}  // namespace lite_detr::cpu::LITE_DETR_ISA
