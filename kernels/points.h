// Where the points of a query lie, in the two ways that kernels take it, and the gradient of that
// for backward kernels. Without PyTorch's headers. All tensors are contiguous.
#pragma once

#include "number_types.h"

namespace lite_detr {

// At locations [B, Q, M, L * P, 2]. Their weights are given.
template <typename T>
struct Locations {
  using Exact = compute_t<T>;
  static constexpr bool kLogits = false;
  const Exact* locations;
  Exact* gradient;
};

// At offsets [B, Q, M, L * P, 2] from reference points [B, Q, L, 2], in cells, or from the centres
// of boxes [B, Q, L, 4]. Their weights are a softmax of logits.
template <typename T>
struct Offsets {
  using Exact = compute_t<T>;
  static constexpr bool kLogits = true;
  const Exact* references;
  int32_t coordinates;  // 2 or 4
  Exact step;           // the unit of an offset from a box, as a share of its width and height
  const T* offsets;
  // What backward kernels write, [B, Q, M, L * P, 2]. On GPUs only the second, from which the first
  // follows.
  T* gradient;            // null on GPUs
  Exact* grad_positions;  // by positions in cells; on CPUs null if it is not needed
};

}  // namespace lite_detr
