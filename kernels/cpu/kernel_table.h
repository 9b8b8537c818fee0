// The table of one instruction set's kernels. The including file defines LITE_DETR_ISA, its name.
#pragma once

#include "key_aware.h"
#include "msda.h"

namespace lite_detr::cpu {
namespace LITE_DETR_ISA {

// Heads of 32, 64, ... channels are processed in blocks of 32, others in blocks of 16.
#define LITE_DETR_BY_WIDTH(kernel, Tensors)                                                       \
  template <typename T, typename Points>                                                          \
  void kernel##_any_width(                                                                        \
      const KernelGeometry& geometry, const Task<T>& task, const Tensors<T, Points>& tensors) {   \
    if (geometry.channels % 32 == 0) {                                                            \
      kernel<T, Points, 32>(geometry, task, tensors);                                             \
    } else {                                                                                      \
      kernel<T, Points, kChannelMultiple>(geometry, task, tensors);                               \
    }                                                                                             \
  }

LITE_DETR_BY_WIDTH(msda_forward, MsdaForward)
LITE_DETR_BY_WIDTH(msda_backward, MsdaBackward)
LITE_DETR_BY_WIDTH(key_aware_forward, KeyAwareForward)
LITE_DETR_BY_WIDTH(key_aware_backward, KeyAwareBackward)

template <typename T, int kChannels>
void store_rows_of(
    const compute_t<T>* source, int64_t padded_channels, const TokenRows<T>& target, int64_t count,
    int64_t channels) {
  using B = Block<compute_t<T>, kChannels>;
  for (int64_t row = 0; row < count; ++row) {
    const compute_t<T>* from = source + row * padded_channels;
    T* to = target.first + row * target.stride;
    for (int64_t channel = 0; channel < channels; channel += kChannels) {
      const B block = load_block<B>(from + channel);
      if (channels - channel >= kChannels) {
        store_block(to + channel, block);
      } else {
        T padded[kChannels];
        store_block(padded, block);
        std::memcpy(to + channel, padded, (channels - channel) * sizeof(T));
      }
    }
  }
}

template <typename T>
void store_rows(
    const compute_t<T>* source, int64_t padded_channels, const TokenRows<T>& target, int64_t count,
    int64_t channels) {
  if (padded_channels % 32 == 0) {
    store_rows_of<T, 32>(source, padded_channels, target, count, channels);
  } else {
    store_rows_of<T, kChannelMultiple>(source, padded_channels, target, count, channels);
  }
}

template <typename T, typename Points>
constexpr PointKernels<T, Points> point_kernels() {
  return {
      msda_forward_any_width<T, Points>, msda_backward_any_width<T, Points>,
      key_aware_forward_any_width<T, Points>, key_aware_backward_any_width<T, Points>};
}

template <typename T>
constexpr Kernels<T> table() {
  return {point_kernels<T, Locations<T>>(), point_kernels<T, Offsets<T>>(), store_rows<T>};
}

}  // namespace LITE_DETR_ISA
}  // namespace lite_detr::cpu
