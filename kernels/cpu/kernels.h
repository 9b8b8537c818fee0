// The interface of the CPU kernels, the same for every instruction set. Without PyTorch's headers:
// the kernels are compiled once for each instruction set, and an inline function of a shared header
// that was compiled for AVX-512 must never run on an older machine.
#pragma once

#include <cstdint>

#include "../points.h"

namespace lite_detr::cpu {

// The points of a group, handled together; `KernelGeometry`'s arrays are padded to a multiple.
constexpr int kGroup = 16;
// Channels of a head are padded to a multiple of this.
constexpr int kChannelMultiple = 16;

// The queries whose points are found together, before the first one is sampled: what finding waits
// for is then done for several at once. More would fill the buffers of stores that wait.
constexpr int kTogether = 4;

// The geometry of a call, as kernels take it.
struct KernelGeometry {
  int64_t queries;   // Q
  int64_t heads;     // M
  int64_t channels;  // D, padded
  int64_t points;    // L * P
  int64_t levels;    // L
  // Levels have a border of rows that are zero or discarded, and so have the first rows: four that
  // are as far apart as a point's corners. Backward kernels only take such rows.
  bool bordered;
  // The level of each point, and zeros after the last one: a map without cells.
  const int32_t* level;
  const int32_t* width;
  const int32_t* height;
  const int32_t* first;  // the row of the level's first token
  const int32_t* pitch;  // from a token's row to that of the one below
};

// The tokens of one head and image: rows of D channels, `stride` elements apart.
template <typename T>
struct TokenRows {
  T* first;
  int64_t stride;
};

// Queries [begin, end) of one head and image, and the rows that they sample.
template <typename T>
struct Task {
  int64_t image;
  int64_t head;
  int64_t begin;
  int64_t end;
  TokenRows<const T> value;
  TokenRows<const T> key;  // `first` is null where the values are the keys
  void* scratch;  // of `scratch_bytes`
  // Of backward kernels only. They add to both gradients, for points [first_point, end_point), which
  // are those of whole levels.
  TokenRows<compute_t<T>> grad_value;
  TokenRows<compute_t<T>> grad_key;
  int64_t first_point;
  int64_t end_point;
  // [L, items, D], the parts of levels in the query's gradient; null if a task has all levels.
  compute_t<T>* level_sums;
  int64_t items;  // B * Q * M
};

inline int64_t groups_of_query(const KernelGeometry& geometry) {
  return (geometry.points + kGroup - 1) / kGroup;
}

// The groups whose points are found together.
inline int64_t groups_together(const KernelGeometry& geometry) {
  const int64_t groups = groups_of_query(geometry);
  return groups < kTogether ? kTogether / groups * groups : groups;
}

// What is found of a group of points takes at most so much.
constexpr int64_t kPlaceBytes = 20 * kGroup * sizeof(double);

// A task's scratch memory, aligned to cache lines: a row of zeros, what is found of points and their
// weights, a row for each point, and one for each query and each level.
inline int64_t scratch_bytes(const KernelGeometry& geometry) {
  const int64_t groups = groups_together(geometry);
  const int64_t rows = 1 + kGroup * groups + kTogether + geometry.levels;
  return groups * (kPlaceBytes + kGroup * sizeof(double)) +
      rows * geometry.channels * sizeof(double);
}

// All tensors are contiguous: weights [B, Q, M, L * P], queries and outputs [B, Q, M, D], logsumexp
// [B, Q, M].
template <typename T, typename Points>
struct MsdaForward {
  Points points;  // Locations<T> or Offsets<T>
  const T* weights;  // or logits
  T* output;
};

template <typename T, typename Points>
struct MsdaBackward {
  Points points;
  const T* weights;  // or logits
  const T* output;   // null unless the weights are logits
  const T* grad_output;
  T* grad_weights;
};

template <typename T, typename Points>
struct KeyAwareForward {
  Points points;
  const T* query;
  compute_t<T> scale;  // of the logits
  T* output;
  compute_t<T>* logsumexp;
};

template <typename T, typename Points>
struct KeyAwareBackward {
  Points points;
  const T* query;
  const T* output;
  const compute_t<T>* logsumexp;
  const T* grad_output;
  compute_t<T> scale;
  T* grad_query;
};

template <typename T, typename Tensors>
using Kernel = void (*)(const KernelGeometry&, const Task<T>&, const Tensors&);

// The kernels for one of the two ways in which points are given.
template <typename T, typename Points>
struct PointKernels {
  Kernel<T, MsdaForward<T, Points>> msda_forward;
  Kernel<T, MsdaBackward<T, Points>> msda_backward;
  Kernel<T, KeyAwareForward<T, Points>> key_aware_forward;
  Kernel<T, KeyAwareBackward<T, Points>> key_aware_backward;
};

// The kernels of one instruction set.
template <typename T>
struct Kernels {
  PointKernels<T, Locations<T>> at_locations;
  PointKernels<T, Offsets<T>> at_offsets;
  // Copies `count` rows of padded channels to rows of `channels`, in the type of storage.
  void (*store_rows)(
      const compute_t<T>* source, int64_t padded_channels, const TokenRows<T>& target,
      int64_t count, int64_t channels);
};

struct AllKernels {
  const char* name;
  Kernels<float> float32;
  Kernels<double> float64;
  Kernels<Float16> float16;
  Kernels<BFloat16> bfloat16;
};

extern const AllKernels portable_kernels;
#if defined(__x86_64__)
extern const AllKernels avx2_kernels;
extern const AllKernels avx512_kernels;
#endif

}  // namespace lite_detr::cpu
