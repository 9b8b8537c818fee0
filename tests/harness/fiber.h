// A thread of a kernel: a function with its own stack, which runs until it yields.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <functional>

namespace lite_detr::harness {

class Fiber {
 public:
  enum class Stop { gave_way, ended, faulted };

  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Starts again with a function that does not throw and outlives the fiber's run. If the fiber has
  // not ended, what is on its stack is lost.
  void begin(const std::function<void()>& function);

  // Runs the function until it stops.
  Stop resume();

  // For the running fiber. Only give_way returns, when the fiber is resumed.
  static void give_way();
  [[noreturn]] static void fault();

  static bool is_running();

  // Whether an address is just beyond the end of the stack.
  bool overflows_at(const void* address) const;

 private:
  static void run();

  char* memory_;  // one page without access, and the stack above it
  ucontext_t start_;
  jmp_buf state_;
  bool has_started_ = false;
  const std::function<void()>* function_ = nullptr;
};

}  // namespace lite_detr::harness
