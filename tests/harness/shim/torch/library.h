// Lets the CUDA operators register for any tensors, in the namespace that their library gives.
#pragma once

#include_next <torch/library.h>

#ifdef LITE_DETR_HARNESS_HOST
extern "C" const char* lite_detr_harness_namespace();

#undef TORCH_LIBRARY
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY(name, library) LITE_DETR_HARNESS_FRAGMENT(library, C10_UID)
#define TORCH_LIBRARY_IMPL(name, key, library) LITE_DETR_HARNESS_FRAGMENT(library, C10_UID)
#define LITE_DETR_HARNESS_FRAGMENT(library, uid)                                         \
  static void C10_CONCATENATE(register_, uid)(torch::Library&);                          \
  static const torch::detail::TorchLibraryInit C10_CONCATENATE(registered_, uid)(        \
      torch::Library::FRAGMENT, &C10_CONCATENATE(register_, uid),                        \
      lite_detr_harness_namespace(), std::nullopt, __FILE__, __LINE__);                  \
  void C10_CONCATENATE(register_, uid)(torch::Library & library)
#endif
