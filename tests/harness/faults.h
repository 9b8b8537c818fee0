// Turns a fault of a kernel's thread, such as that of a pointer to device memory which is
// dereferenced without a check, into a stop of its fiber.
#pragma once

#include <signal.h>

namespace lite_detr::harness {

// While it lives, the faults of fibers of this thread are caught; all others go on as before.
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
