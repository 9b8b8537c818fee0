// The interface of the CPU kernels, the same for every instruction set. Without PyTorch's headers:
// the kernels are compiled once for each instruction set, and an inline function of a shared header
// that was compiled for AVX-512 must never run on an older machine.
#pragma once

#include <cstdint>

#include "../number_types.h"

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
  // The level of each point, and zeros after the last one: a map without cells.
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
  compute_t<T>* scratch;  // kScratchRows rows, of which the first one stays zero
};

// Zeros, a row for what is discarded, and two rows for each point of a group.
constexpr int kScratchRows = 2 + 2 * kGroup;

// All tensors are contiguous: locations [B, Q, M, L * P, 2], weights [B, Q, M, L * P], queries and
// outputs [B, Q, M, D], logsumexp [B, Q, M].
template <typename T>
struct MsdaForward {
  const compute_t<T>* locations;
  const T* weights;
  T* output;
};

template <typename T>
struct MsdaBackward {
  const compute_t<T>* locations;
  const T* weights;
  const T* grad_output;
  compute_t<T>* grad_locations;
  T* grad_weights;
};

template <typename T>
struct KeyAwareForward {
  const T* query;
  const compute_t<T>* locations;
  compute_t<T> scale;  // of the logits
  T* output;
  compute_t<T>* logsumexp;
};

template <typename T>
struct KeyAwareBackward {
  const T* query;
  const compute_t<T>* locations;
  const T* output;
  const compute_t<T>* logsumexp;
  const T* grad_output;
  compute_t<T> scale;
  T* grad_query;
  compute_t<T>* grad_locations;
};

// The kernels of one instruction set.
template <typename T>
struct Kernels {
  void (*msda_forward)(const KernelGeometry&, const Task<T>&, const MsdaForward<T>&);
  void (*msda_backward)(const KernelGeometry&, const Task<T>&, const MsdaBackward<T>&);
  void (*key_aware_forward)(const KernelGeometry&, const Task<T>&, const KeyAwareForward<T>&);
  void (*key_aware_backward)(
      const KernelGeometry&, const Task<T>&, const KeyAwareBackward<T>&);
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
