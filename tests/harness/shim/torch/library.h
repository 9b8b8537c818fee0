// Lets the CUDA operators register for any tensors, in a namespace for each architecture.
#pragma once

#include_next <torch/library.h>

#ifdef LITE_DETR_HARNESS_NAMESPACE
#undef TORCH_LIBRARY
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY(name, library) TORCH_LIBRARY_FRAGMENT(LITE_DETR_HARNESS_NAMESPACE, library)
#define TORCH_LIBRARY_IMPL(name, key, library) \
  TORCH_LIBRARY_FRAGMENT(LITE_DETR_HARNESS_NAMESPACE, library)
#endif
