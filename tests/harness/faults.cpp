#include "faults.h"

#include <pthread.h>

#include <cerrno>
#include <cstring>
#include <system_error>

#include "fiber.h"

namespace lite_detr::harness {

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS};
// The handler cannot run on a fiber's stack that has overflowed.
alignas(64) char handler_stack[64 << 10];

struct sigaction old_actions[2];
pthread_t catcher;
const void* volatile fault_address;

void handle(int signal, siginfo_t* info, void*) {
  if (!Fiber::is_running() || !pthread_equal(pthread_self(), catcher)) {
    // The instruction runs again, and the previous handler gets the signal.
    sigaction(signal, &old_actions[signal == SIGBUS], nullptr);
    return;
  }
  fault_address = info->si_addr;
  Fiber::fault();
}

}  // namespace

FaultsCaught::FaultsCaught() {
  catcher = pthread_self();
  stack_t stack = {};
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof(handler_stack);
  if (sigaltstack(&stack, &old_stack_) != 0) {
    throw std::system_error(errno, std::generic_category(), "sigaltstack");
  }
  struct sigaction action = {};
  action.sa_sigaction = handle;
  // The handler does not return, so that the signal must not stay blocked.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &old_actions[i]);
}

FaultsCaught::~FaultsCaught() {
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &old_actions[i], nullptr);
  sigaltstack(&old_stack_, nullptr);
}

const void* FaultsCaught::address() { return fault_address; }

}  // namespace lite_detr::harness
