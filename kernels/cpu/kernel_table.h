// The table of one instruction set's kernels. The including file defines LITE_DETR_ISA, its name.
#pragma once

#include "key_aware.h"
#include "msda.h"

namespace lite_detr::cpu {
namespace LITE_DETR_ISA {

// Heads of 32, 64, ... channels are processed in blocks of 32, others in blocks of 16.
#define LITE_DETR_BY_WIDTH(kernel, tensors_type)                                                  \
  template <typename T>                                                                           \
  void kernel##_any_width(                                                                        \
      const KernelGeometry& geometry, const Task<T>& task, const tensors_type<T>& tensors) {      \
    if (geometry.channels % 32 == 0) {                                                            \
      kernel<T, 32>(geometry, task, tensors);                                                     \
    } else {                                                                                      \
      kernel<T, kChannelMultiple>(geometry, task, tensors);                                       \
    }                                                                                             \
  }

LITE_DETR_BY_WIDTH(msda_forward, MsdaForward)
LITE_DETR_BY_WIDTH(msda_backward, MsdaBackward)
LITE_DETR_BY_WIDTH(key_aware_forward, KeyAwareForward)
LITE_DETR_BY_WIDTH(key_aware_backward, KeyAwareBackward)

template <typename T>
void store_rows(
    const compute_t<T>* source, int64_t padded_channels, const TokenRows<T>& target, int64_t count,
    int64_t channels) {
  for (int64_t row = 0; row < count; ++row) {
    const compute_t<T>* from = source + row * padded_channels;
    T* to = target.first + row * target.stride;
    for (int64_t channel = 0; channel < channels; channel += kGroup) {
      const int64_t remaining = channels - channel;
      store_group(to + channel, remaining < kGroup ? int(remaining) : kGroup, from + channel);
    }
  }
}

template <typename T>
constexpr Kernels<T> table() {
  return {
      msda_forward_any_width<T>, msda_backward_any_width<T>, key_aware_forward_any_width<T>,
      key_aware_backward_any_width<T>, store_rows<T>};
}

}  // namespace LITE_DETR_ISA
}  // namespace lite_detr::cpu
