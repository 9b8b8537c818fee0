// CUDA's bfloat16 numbers: the upper half of a float.
#pragma once

#include "cuda_runtime.h"

struct alignas(2) __nv_bfloat16 {
  unsigned short bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 number) { return number.bits; }

inline float __bfloat162float(__nv_bfloat16 number) {
  return __uint_as_float((unsigned int)(number.bits) << 16);
}

// Rounds to nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16_rn(float number) {
  const unsigned int bits = __float_as_uint(number);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
  const unsigned int odd = bits >> 16 & 1;
  return {(unsigned short)((bits + 0x7fff + odd) >> 16)};
}

inline float2 __bfloat1622float2(__nv_bfloat162 pair) {
  return {__bfloat162float(pair.x), __bfloat162float(pair.y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 pair) {
  return {__float2bfloat16_rn(pair.x), __float2bfloat16_rn(pair.y)};
}
