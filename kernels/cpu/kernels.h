// What the CPU kernels of every instruction set offer. Plain C++ without PyTorch's headers: these
// are compiled once for each instruction set, and an inline function of a shared header that was
// compiled for AVX-512 must never be the one that an older machine runs.
#pragma once

#include <cstdint>

#include "../number_types.h"

namespace lite_detr::cpu {

// Points are handled in groups of so many; `Geometry`'s arrays are padded to a multiple of it.
constexpr int kGroup = 16;
// Channels of a head are padded to a multiple of this.
constexpr int kChannelMultiple = 16;

// The sizes of a problem.
struct Geometry {
  int64_t tokens;    // S
  int64_t queries;   // Q
  int64_t heads;     // M
  int64_t channels;  // D, padded
  int64_t points;    // L * P
  // Of the level of each point; zeros behind the last one, which makes a map without cells.
  const int32_t* width;
  const int32_t* height;
  const int32_t* start;
};

// The tokens of one head of one image: S rows of D channels, `stride` elements apart.
template <typename T>
struct Rows {
  T* first;
  int64_t stride;
};

// Queries [begin, end) of one head of one image, and the rows that they sample.
template <typename T>
struct Task {
  int64_t image;
  int64_t head;
  int64_t begin;
  int64_t end;
  Rows<const T> value;
  Rows<const T> key;  // `first` is null where the values are the keys
  Rows<compute_t<T>> grad_value;  // of a backward kernel, which adds to them; so is grad_key
  Rows<compute_t<T>> grad_key;
  compute_t<T>* scratch;  // kScratchRows rows; the first one is zero and stays so
};

// Zeros, a row to discard into, and two for each point of a group.
constexpr int kScratchRows = 2 + 2 * kGroup;

// All tensors are contiguous: locations [B, Q, M, L * P, 2], weights [B, Q, M, L * P], queries and
// outputs [B, Q, M, D], logsumexp [B, Q, M].
template <typename T>
struct PlainForward {
  const compute_t<T>* locations;
  const T* weights;
  T* output;
};

template <typename T>
struct PlainBackward {
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
  void (*plain_forward)(const Geometry&, const Task<T>&, const PlainForward<T>&);
  void (*plain_backward)(const Geometry&, const Task<T>&, const PlainBackward<T>&);
  void (*key_aware_forward)(const Geometry&, const Task<T>&, const KeyAwareForward<T>&);
  void (*key_aware_backward)(const Geometry&, const Task<T>&, const KeyAwareBackward<T>&);
  // Copies `count` rows of padded channels to rows of `channels`, in the type of storage.
  void (*store_rows)(
      const compute_t<T>* source, int64_t padded_channels, const Rows<T>& target, int64_t count,
      int64_t channels);
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
