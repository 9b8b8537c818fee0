// Turns a fault of a kernel's thread, for example by dereferencing a pointer to device memory
// without a check, into a stop of its fiber.
#pragma once

#include <signal.h>

namespace lite_detr::harness {

// While it lives, faults in fibers of this thread are caught; all others are handled as before.
class FaultsCaught {
 public:
  FaultsCaught();
  ~FaultsCaught();
  FaultsCaught(const FaultsCaught&) = delete;
  FaultsCaught& operator=(const FaultsCaught&) = delete;

  // The address of the fault that stopped a fiber.
  static const void* address();

 private:
  stack_t old_stack_;
};

}  // namespace lite_detr::harness
