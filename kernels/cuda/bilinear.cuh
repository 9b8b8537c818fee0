// Where a sampled point lies on a feature map.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lite_detr::cuda {

// The position in cells of a coordinate from 0 to 1 across `cells` cells.
template <typename Real>
__device__ __forceinline__ Real to_cells(Real coordinate, int32_t cells) {
  return coordinate * Real(cells) - Real(0.5);
}

// The four cells around a position: top left, top right, bottom left, bottom right.
template <typename Real>
struct Corners {
  int32_t token[4];  // index into the S tokens, or -1 outside the map, where values are zero
  int32_t first;     // the top left token, even if it is not on the map
  Real right;        // weight of the two right cells, 0 to 1
  Real lower;        // weight of the two lower cells, 0 to 1
};

// Finds the corners of a position in cells, on a map of width x height cells that begins at token
// `start`. The centre of the first cell is at (0, 0).
//
// Free of branches. A position that is NaN, infinite or outside the map fails the comparison and
// becomes a cell that is never read, before a conversion to an integer could overflow.
template <typename Real>
__device__ __forceinline__ Corners<Real> find_corners(
    Real column, Real row, int32_t width, int32_t height, int32_t start) {
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
  const int32_t token = start + upper * width + left;

  Corners<Real> corners;
  corners.first = token;
  corners.token[0] = has_left & has_upper ? token : -1;
  corners.token[1] = has_right & has_upper ? token + 1 : -1;
  corners.token[2] = has_left & has_lower ? token + width : -1;
  corners.token[3] = has_right & has_lower ? token + width + 1 : -1;
  corners.right = column - Real(left);
  corners.lower = row - Real(upper);
  return corners;
}

}  // namespace lite_detr::cuda
