#pragma once

#include <c10/core/Device.h>

namespace c10::cuda {

// There is one device here, and it is always the current one.
struct CUDAGuard {
  explicit CUDAGuard(Device) {}
};

}  // namespace c10::cuda
