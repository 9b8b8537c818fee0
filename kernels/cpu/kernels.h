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

// The geometry of a call, as kernels take it.
struct KernelGeometry {
  int64_t tokens;    // S
  int64_t queries;   // Q
  int64_t heads;     // M
  int64_t channels;  // D, padded
  int64_t points;    // L * P
  int64_t levels;    // L
  // The level of each point, and zeros after the last one: a map without cells.
  const int32_t* level;
  const int32_t* width;
  const int32_t* height;
  const int32_t* start;
};

// The tokens of one head and image: S rows of D channels, `stride` elements apart.
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
  TokenRows<compute_t<T>> grad_value;  // backward kernels add to both
  TokenRows<compute_t<T>> grad_key;
  compute_t<T>* scratch;  // kScratchRows rows, of which the first one stays zero, and weights
};

// A task's scratch memory: a row of zeros, a row for what is discarded, and two rows for each point
// of a group; then the weights of all points of a query, up to a whole group.
constexpr int kScratchRows = 2 + 2 * kGroup;

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
