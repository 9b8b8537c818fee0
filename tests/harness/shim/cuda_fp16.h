// CUDA's half precision numbers: 1 bit of sign, 5 of exponent, 10 of fraction.
#pragma once

#include "cuda_runtime.h"

struct alignas(2) __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half number) { return number.bits; }

inline float __half2float(__half number) {
  const unsigned int sign = (number.bits & 0x8000u) << 16;
  const unsigned int exponent = number.bits >> 10 & 0x1f;
  const unsigned int fraction = number.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal, in units of 2^-24
    const float magnitude = float(fraction) * 0x1p-24f;
    return __uint_as_float(sign | __float_as_uint(magnitude));
  }
  const unsigned int wide = exponent == 0x1f ? 0xff : exponent - 15 + 127;
  return __uint_as_float(sign | wide << 23 | fraction << 13);
}

// Rounds to nearest, ties to even.
inline __half __float2half_rn(float number) {
  const unsigned int bits = __float_as_uint(number);
  const unsigned short sign = bits >> 16 & 0x8000;
  const unsigned int magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7fff};
  // At least halfway between the largest number and what would be the next one.
  if (magnitude >= 0x477ff000) return {(unsigned short)(sign | 0x7c00)};
  if (magnitude < 0x38800000) {
    // Below 2^-14 halves are 2^-24 apart, as floats from 0.5 to 1 are: the addition rounds.
    const float shifted = __uint_as_float(magnitude) + 0.5f;
    return {(unsigned short)(sign | (__float_as_uint(shifted) - __float_as_uint(0.5f)))};
  }
  const unsigned int odd = magnitude >> 13 & 1;
  const unsigned int rounded = magnitude + 0xfff + odd - ((127u - 15u) << 23);
  return {(unsigned short)(sign | rounded >> 13)};
}

inline float2 __half22float2(__half2 pair) {
  return {__half2float(pair.x), __half2float(pair.y)};
}
inline __half2 __float22half2_rn(float2 pair) {
  return {__float2half_rn(pair.x), __float2half_rn(pair.y)};
}
