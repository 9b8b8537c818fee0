// A thread of a kernel: a function with a stack of its own, which runs until it gives way.
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

  // Begins anew with a function that throws nothing and outlives the fiber's run. What was on the
  // stack of one that has not ended is lost.
  void begin(const std::function<void()>& function);

  // Runs the function until one of these.
  Stop resume();

  // Of the fiber that runs; none of them returns but give_way, when it is resumed.
  static void give_way();
  [[noreturn]] static void fault();

  static bool is_running();

  // Whether an address is where the stack comes to when it is used up.
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
