// The types of numbers that tensors hold, and the types that kernels compute in.
#pragma once

#include <cstdint>

namespace lite_detr {

// Storage for 16-bit floating-point numbers; arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type that arithmetic on T uses.
template <typename T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <typename T>
using compute_t = typename Compute<T>::type;

}  // namespace lite_detr
