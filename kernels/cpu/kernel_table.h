// The table of one instruction set's kernels. The including file defines LITE_DETR_ISA, its name.
#pragma once

#include "key_aware.h"
#include "msda.h"

namespace lite_detr::cpu {
namespace LITE_DETR_ISA {

// Heads of 32 channels, which most detectors have, are one block, others several of 16.
#define LITE_DETR_FORWARD(kernel, Tensors)                                                        \
  template <typename T, typename Points>                                                          \
  void kernel##_any_rows(                                                                         \
      const KernelGeometry& geometry, const Task<T>& task, const Tensors<T, Points>& tensors) {   \
    if (geometry.channels == 32) {                                                                \
      if (geometry.bordered) {                                                                    \
        kernel<T, Points, Bordered<32>, 32>(geometry, task, tensors);                             \
      } else {                                                                                    \
        kernel<T, Points, InPlace, 32>(geometry, task, tensors);                                  \
      }                                                                                           \
    } else if (geometry.bordered) {                                                               \
      kernel<T, Points, Bordered<0>, kChannelMultiple>(geometry, task, tensors);                  \
    } else {                                                                                      \
      kernel<T, Points, InPlace, kChannelMultiple>(geometry, task, tensors);                      \
    }                                                                                             \
  }
#define LITE_DETR_BACKWARD(kernel, Tensors)                                                       \
  template <typename T, typename Points>                                                          \
  void kernel##_any_rows(                                                                         \
      const KernelGeometry& geometry, const Task<T>& task, const Tensors<T, Points>& tensors) {   \
    if (geometry.channels == 32) {                                                                \
      kernel<T, Points, Bordered<32>, 32>(geometry, task, tensors);                               \
    } else {                                                                                      \
      kernel<T, Points, Bordered<0>, kChannelMultiple>(geometry, task, tensors);                  \
    }                                                                                             \
  }

LITE_DETR_FORWARD(msda_forward, MsdaForward)
LITE_DETR_BACKWARD(msda_backward, MsdaBackward)
LITE_DETR_FORWARD(key_aware_forward, KeyAwareForward)
LITE_DETR_BACKWARD(key_aware_backward, KeyAwareBackward)

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
  // As the kernels, whose order of channels may depend on it.
  if (padded_channels == 32) {
    store_rows_of<T, 32>(source, padded_channels, target, count, channels);
  } else {
    store_rows_of<T, kChannelMultiple>(source, padded_channels, target, count, channels);
  }
}

template <typename T, typename Points>
constexpr PointKernels<T, Points> point_kernels() {
  return {
      msda_forward_any_rows<T, Points>, msda_backward_any_rows<T, Points>,
      key_aware_forward_any_rows<T, Points>, key_aware_backward_any_rows<T, Points>};
}

template <typename T>
constexpr Kernels<T> table() {
  return {point_kernels<T, Locations<T>>(), point_kernels<T, Offsets<T>>(), store_rows<T>};
}

}  // namespace LITE_DETR_ISA
}  // namespace lite_detr::cpu
