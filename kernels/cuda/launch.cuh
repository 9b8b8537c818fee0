// Launches the instance of a kernel for the width of the head.
#pragma once

#include <type_traits>

#include "key_aware.cuh"
#include "msda.cuh"

namespace lite_detr::cuda {

// Calls `run` with the one of kHeadWidths, if kernels of T are compiled for it.
template <typename T, typename Run>
cudaError_t for_head_width(int32_t channels, Run run) {
  switch (channels) {
    case 16:
      if constexpr (kMinHeadWidth<T> <= 16) return run(std::integral_constant<int, 16>());
      return cudaErrorInvalidValue;
    case 32:
      return run(std::integral_constant<int, 32>());
    case 64:
      return run(std::integral_constant<int, 64>());
    case 128:
      return run(std::integral_constant<int, 128>());
    case 256:
      return run(std::integral_constant<int, 256>());
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename Arguments>
cudaError_t launch_kernel(
    void (*kernel)(Arguments), const Layout& layout, const Arguments& arguments,
    cudaStream_t stream) {
  const Grid size = grid(layout, arguments.geometry);
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  return cudaLaunchKernel(kernel, size.blocks, dim3(size.threads), pointers, 0, stream);
}

template <typename T, typename Points>
cudaError_t launch(const MsdaForward<T, Points>& arguments, cudaStream_t stream) {
  return for_head_width<T>(arguments.geometry.channels, [&](auto width) {
    constexpr int kHeadWidth = width;
    constexpr Layout kLayout = kMsdaForward<T, kHeadWidth>;
    return launch_kernel(msda_forward<T, Points, kHeadWidth>, kLayout, arguments, stream);
  });
}

template <typename T, typename Points>
cudaError_t launch(const MsdaBackward<T, Points>& arguments, cudaStream_t stream) {
  return for_head_width<T>(arguments.geometry.channels, [&](auto width) {
    constexpr int kHeadWidth = width;
    constexpr Layout kLayout = kMsdaBackward<T, kHeadWidth>;
    return launch_kernel(msda_backward<T, Points, kHeadWidth>, kLayout, arguments, stream);
  });
}

template <typename T, typename Points>
cudaError_t launch(const KeyAwareForward<T, Points>& arguments, cudaStream_t stream) {
  return for_head_width<T>(arguments.geometry.channels, [&](auto width) {
    constexpr int kHeadWidth = width;
    constexpr Layout kSharedLayout = kKeyAwareForward<T, kHeadWidth, true>;
    constexpr Layout kLayout = kKeyAwareForward<T, kHeadWidth, false>;
    return arguments.key.data == nullptr
        ? launch_kernel(
              key_aware_forward<T, Points, kHeadWidth, true>, kSharedLayout, arguments, stream)
        : launch_kernel(
              key_aware_forward<T, Points, kHeadWidth, false>, kLayout, arguments, stream);
  });
}

template <typename T, typename Points>
cudaError_t launch(const KeyAwareBackward<T, Points>& arguments, cudaStream_t stream) {
  return for_head_width<T>(arguments.geometry.channels, [&](auto width) {
    constexpr int kHeadWidth = width;
    constexpr Layout kSharedLayout = kKeyAwareBackward<T, kHeadWidth, true>;
    constexpr Layout kLayout = kKeyAwareBackward<T, kHeadWidth, false>;
    return arguments.key.data == nullptr
        ? launch_kernel(
              key_aware_backward<T, Points, kHeadWidth, true>, kSharedLayout, arguments, stream)
        : launch_kernel(
              key_aware_backward<T, Points, kHeadWidth, false>, kLayout, arguments, stream);
  });
}

#define LITE_DETR_INSTANCES_AT(T, Points)                                           \
  template cudaError_t launch(const MsdaForward<T, Points<T>>&, cudaStream_t);      \
  template cudaError_t launch(const MsdaBackward<T, Points<T>>&, cudaStream_t);     \
  template cudaError_t launch(const KeyAwareForward<T, Points<T>>&, cudaStream_t);  \
  template cudaError_t launch(const KeyAwareBackward<T, Points<T>>&, cudaStream_t);
#define LITE_DETR_INSTANCES(T)         \
  LITE_DETR_INSTANCES_AT(T, Locations) \
  LITE_DETR_INSTANCES_AT(T, Offsets)

}  // namespace lite_detr::cuda
