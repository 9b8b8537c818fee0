#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace lite_detr::harness {

namespace {

const size_t kPage = size_t(sysconf(_SC_PAGESIZE));
constexpr size_t kStack = size_t(256) << 10;

Fiber* running = nullptr;
jmp_buf resumer;

// _setjmp and _longjmp do not save the signal mask, which would take a system call each time.
void leave(Fiber::Stop stop) { _longjmp(resumer, int(stop) + 1); }

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(
      nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
      -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) {
    throw std::system_error(errno, std::generic_category(), "no stack for a kernel's thread");
  }
  memory_ = static_cast<char*>(memory);
}

Fiber::~Fiber() { munmap(memory_, kPage + kStack); }

void Fiber::begin(const std::function<void()>& function) {
  function_ = &function;
  has_started_ = false;
  getcontext(&start_);
  start_.uc_stack.ss_sp = memory_ + kPage;
  start_.uc_stack.ss_size = kStack;
  start_.uc_link = nullptr;
  makecontext(&start_, &Fiber::run, 0);
}

void Fiber::run() {
  (*running->function_)();
  leave(Stop::ended);
}

Fiber::Stop Fiber::resume() {
  running = this;
  const int stop = _setjmp(resumer);
  if (stop == 0) {
    if (has_started_) _longjmp(state_, 1);
    has_started_ = true;
    setcontext(&start_);
  }
  running = nullptr;
  return Stop(stop - 1);
}

void Fiber::give_way() {
  if (_setjmp(running->state_) == 0) leave(Stop::gave_way);
}

void Fiber::fault() {
  leave(Stop::faulted);
  __builtin_unreachable();
}

bool Fiber::is_running() { return running != nullptr; }

bool Fiber::overflows_at(const void* address) const {
  const char* place = static_cast<const char*>(address);
  return place >= memory_ && place < memory_ + kPage;
}

}  // namespace lite_detr::harness
