// The arguments of the CUDA kernels, and the functions that launch them. Without PyTorch's headers:
// so device code compiles fast, and wherever there are the few CUDA built-ins that it uses.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../points.h"

namespace lite_detr::cuda {

// Levels are part of a launch's arguments, which have room for 4 KiB in all.
constexpr int kMaxLevels = 32;
// Images and heads are coordinates of a grid.
constexpr int kMaxGrid = 65535;
// Queries of all heads and images, and points of a query, are numbered in 32 bits, with room for
// the numbers that a last block goes beyond them.
constexpr int64_t kMaxItems = INT32_MAX - 256;
// The head widths that kernels are compiled for. Heads of other widths are padded, so that no
// kernel has to ask which channels exist; wider ones do not fit into the registers of a warp.
constexpr int kHeadWidths[] = {16, 32, 64, 128, 256};
// A row of float64 is loaded by a whole warp or more.
template <typename T>
constexpr int kMinHeadWidth = sizeof(T) == 8 ? 32 : 16;
// Rows are read in pieces of this size, the most that a lane loads at once.
constexpr int kVectorBytes = 16;
template <typename T>
constexpr int kChannelMultiple = kVectorBytes / sizeof(T);

// The geometry of a call. All sizes are positive; B * Q * M and L * P are at most kMaxItems.
struct KernelGeometry {
  int32_t batch;     // B, at most kMaxGrid
  int32_t queries;   // Q
  int32_t heads;     // M, at most kMaxGrid
  int32_t channels;  // D, one of kHeadWidths
  int32_t points;    // P, on each level
  int32_t levels;    // L
  int32_t query_level;  // the queries are the tokens of this level and those after it; L: they are not
  int32_t height[kMaxLevels];
  int32_t width[kMaxLevels];
  int32_t start[kMaxLevels];
};

// The first level whose tokens, with all after them, are as many as the queries; L if there is none.
// Queries that are not these tokens after all are taken in another order, with the same results.
inline int32_t find_query_level(const KernelGeometry& geometry) {
  int64_t tokens = 0;
  for (int32_t level = geometry.levels - 1; level >= 0; --level) {
    tokens += int64_t(geometry.height[level]) * geometry.width[level];
    if (tokens == geometry.queries) return level;
  }
  return geometry.levels;
}

// A tensor [B, S, M, D] with channels side by side; strides in bytes, multiples of kVectorBytes.
// Offsets within an image are 32-bit multiples of kVectorBytes.
template <typename T>
struct TokenRows {
  T* data;
  int64_t batch_stride;
  int64_t head_stride;
  int32_t token_stride;
};

// All other tensors are contiguous and start at a multiple of kVectorBytes: weights
// [B, Q, M, L * P], queries and outputs [B, Q, M, D], logsumexp [B, Q, M].
template <typename T, typename Points>
struct MsdaForward {
  KernelGeometry geometry;
  TokenRows<const T> value;
  Points points;  // Locations<T> or Offsets<T>
  const T* weights;  // or logits
  T* output;
};

template <typename T, typename Points>
struct MsdaBackward {
  KernelGeometry geometry;
  TokenRows<const T> value;
  Points points;
  const T* weights;  // or logits
  const T* output;   // null unless the weights are logits
  const T* grad_output;
  TokenRows<compute_t<T>> grad_value;  // added to
  T* grad_weights;
};

template <typename T, typename Points>
struct KeyAwareForward {
  KernelGeometry geometry;
  TokenRows<const T> value;
  TokenRows<const T> key;  // `data` is null if the values are the keys
  const T* query;
  Points points;
  compute_t<T> scale;  // of the logits
  T* output;
  compute_t<T>* logsumexp;
};

template <typename T, typename Points>
struct KeyAwareBackward {
  KernelGeometry geometry;
  TokenRows<const T> value;
  TokenRows<const T> key;
  const T* query;
  Points points;
  compute_t<T> scale;
  const T* output;
  const compute_t<T>* logsumexp;
  const T* grad_output;
  TokenRows<compute_t<T>> grad_value;  // added to; of key and value if they are one
  TokenRows<compute_t<T>> grad_key;    // added to; `data` is null if the values are the keys
  T* grad_query;  // added to in float64, whose sums do not all fit into registers
};

// Launch one kernel on a stream, without waiting for it. T is float, double, Float16 or BFloat16,
// each with a file of instances.
template <typename T, typename Points>
cudaError_t launch(const MsdaForward<T, Points>& arguments, cudaStream_t stream);
template <typename T, typename Points>
cudaError_t launch(const MsdaBackward<T, Points>& arguments, cudaStream_t stream);
template <typename T, typename Points>
cudaError_t launch(const KeyAwareForward<T, Points>& arguments, cudaStream_t stream);
template <typename T, typename Points>
cudaError_t launch(const KeyAwareBackward<T, Points>& arguments, cudaStream_t stream);

// The GPUs that the kernels are compiled for, as the compiler lists them, and those that they have PTX
// of: "800,900/800+900".
const char* architectures();

}  // namespace lite_detr::cuda
