// Where a sampling location lies on a feature map: the arithmetic that the CPU and the CUDA kernels
// share.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LITE_DETR_INLINE __host__ __device__ __forceinline__
#else
#define LITE_DETR_INLINE inline __attribute__((always_inline))
#endif

namespace lite_detr {

// Where a location lies between the centres of four cells, its corners: top left, top right, bottom
// left and bottom right.
template <typename Real>
struct Place {
  int32_t token;   // of the top left corner, whether it exists or not
  bool exists[4];  // whether a corner is on the map; where not, values are zero
  Real right;      // share of the two right corners, 0 to 1
  Real lower;      // share of the two lower corners, 0 to 1
};

// Finds the place of (x, y), given in [0, 1] across a map of width x height cells that begins at
// token `start`. The centre of the first cell is at (0.5 / width, 0.5 / height).
//
// Without branches, so that a compiler can do several locations at once. A location that is NaN,
// infinite or anywhere outside fails the comparison and gets corners that do not exist, before any
// conversion to an integer that could overflow.
template <typename Real>
LITE_DETR_INLINE Place<Real> find_place(
    Real x, Real y, int32_t width, int32_t height, int32_t start) {
  Real column = x * Real(width) - Real(0.5);
  Real row = y * Real(height) - Real(0.5);
  const bool inside = (column > Real(-1)) & (column < Real(width)) & (row > Real(-1)) &
      (row < Real(height));
  column = inside ? column : Real(0);
  row = inside ? row : Real(0);
  // Rounds towards zero, then down for what is negative.
  int32_t left = int32_t(column);
  int32_t upper = int32_t(row);
  left -= column < Real(left);
  upper -= row < Real(upper);

  const bool has_left = inside & (left >= 0);
  const bool has_right = inside & (left + 1 < width);
  const bool has_upper = upper >= 0;
  const bool has_lower = upper + 1 < height;

  Place<Real> place;
  place.token = start + upper * width + left;
  place.exists[0] = has_left & has_upper;
  place.exists[1] = has_right & has_upper;
  place.exists[2] = has_left & has_lower;
  place.exists[3] = has_right & has_lower;
  place.right = column - Real(left);
  place.lower = row - Real(upper);
  return place;
}

}  // namespace lite_detr
