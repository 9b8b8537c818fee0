// What the CUDA kernels take, and the functions that launch them. Without PyTorch's headers, so
// that the device code compiles fast, and anywhere that has the few built-ins of CUDA that it uses.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../number_types.h"

namespace lite_detr::cuda {

// Levels travel with a launch's arguments, which have room for 4 KiB in all.
constexpr int kMaxLevels = 32;
// Images and heads are numbered by the coordinates of a grid.
constexpr int kMaxGrid = 65535;
// Queries of all heads and images, and points of a query, are numbered in 32 bits, with room for
// what a last block numbers beyond them.
constexpr int64_t kMaxItems = INT32_MAX - 256;
// The widths of heads that kernels are compiled for. Others are padded to the next of them, so that
// no kernel has to ask which channels exist; wider ones do not fit into the registers of a warp.
constexpr int kHeadWidths[] = {16, 32, 64, 128, 256};
// A warp is the least that loads a row of float64.
template <typename T>
constexpr int kMinHeadWidth = sizeof(T) == 8 ? 32 : 16;
// Rows of channels are read in pieces of so many bytes, the most that a lane loads at once.
constexpr int kVectorBytes = 16;
template <typename T>
constexpr int kChannelMultiple = kVectorBytes / sizeof(T);

// The sizes of a problem. All of them are positive; B * Q * M and L * P are at most kMaxItems.
struct Geometry {
  int32_t batch;     // B, at most kMaxGrid
  int32_t queries;   // Q
  int32_t heads;     // M, at most kMaxGrid
  int32_t channels;  // D, one of kHeadWidths
  int32_t points;    // P, on each level
  int32_t levels;    // L
  int32_t height[kMaxLevels];
  int32_t width[kMaxLevels];
  int32_t start[kMaxLevels];
};

// A tensor [B, S, M, D] with channels side by side; strides in bytes, multiples of kVectorBytes.
//
// A token's number times its stride is a widening 32-bit multiplication, one instruction with the
// 64-bit address as its result: no tensor is too large for it, and none would be faster without.
template <typename T>
struct Rows {
  T* data;
  int64_t batch_stride;
  int64_t head_stride;
  int32_t token_stride;
};

// All other tensors are contiguous and begin at a multiple of kVectorBytes: locations
// [B, Q, M, L * P, 2], weights [B, Q, M, L * P], queries and outputs [B, Q, M, D], logsumexp
// [B, Q, M].
template <typename T>
struct PlainForward {
  Geometry geometry;
  Rows<const T> value;
  const compute_t<T>* locations;
  const T* weights;
  T* output;
};

template <typename T>
struct PlainBackward {
  Geometry geometry;
  Rows<const T> value;
  const compute_t<T>* locations;
  const T* weights;
  const T* grad_output;
  Rows<compute_t<T>> grad_value;  // added to
  compute_t<T>* grad_locations;
  T* grad_weights;
};

template <typename T>
struct KeyAwareForward {
  Geometry geometry;
  Rows<const T> value;
  Rows<const T> key;  // `data` is null where the values are the keys
  const T* query;
  const compute_t<T>* locations;
  compute_t<T> scale;  // of the logits
  T* output;
  compute_t<T>* logsumexp;
};

template <typename T>
struct KeyAwareBackward {
  Geometry geometry;
  Rows<const T> value;
  Rows<const T> key;
  const T* query;
  const compute_t<T>* locations;
  compute_t<T> scale;
  const T* output;
  const compute_t<T>* logsumexp;
  const T* grad_output;
  Rows<compute_t<T>> grad_value;  // added to; of key and value where they are one
  Rows<compute_t<T>> grad_key;    // added to; `data` is null where the values are the keys
  T* grad_query;  // added to in float64, where not all sums fit into registers
  compute_t<T>* grad_locations;
};

// Each launches one kernel on a stream and does not wait for it. For T of float, double, Float16
// and BFloat16: one file of instances each.
template <typename T>
cudaError_t launch(const PlainForward<T>& arguments, cudaStream_t stream);
template <typename T>
cudaError_t launch(const PlainBackward<T>& arguments, cudaStream_t stream);
template <typename T>
cudaError_t launch(const KeyAwareForward<T>& arguments, cudaStream_t stream);
template <typename T>
cudaError_t launch(const KeyAwareBackward<T>& arguments, cudaStream_t stream);

}  // namespace lite_detr::cuda
