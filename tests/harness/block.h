// The threads of a block and what they wait for.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "fiber.h"
#include "schedule.h"
#include "shim/vector_types.h"
#include "synchronisation.h"

namespace lite_detr::harness {

constexpr int kWarpSize = 32;

// Each lane is in one of four sets: ready to run, waiting for others of the warp, at the block's
// barrier, or exited. Lanes of the last warp that the block does not fill have exited.
struct Warp {
  uint32_t ready = 0;
  uint32_t waiting = 0;
  uint32_t at_barrier = 0;
  uint32_t exited = 0;
  Arrival arrivals[kWarpSize];
  uint64_t received[kWarpSize];

  // The lanes of the mask that have not exited and do not wait at the same intrinsic. If there are
  // none, the arrival need not wait any longer.
  uint32_t missing(const Arrival& arrival) const;
};

// Threads are numbered, x first. Their mistakes are thrown as exceptions.
class Block {
 public:
  // Starts the kernel in fibers, one for each thread; there may be more of them.
  Block(
      uint3 index, dim3 size, std::vector<Fiber*> fibers, const std::function<void()>& kernel);

  // Chooses a thread that can run; throws if all that have not exited wait for each other.
  int choose(Schedule& schedule) const;
  bool has_exited() const;

  void arrive(int thread, const Arrival& arrival);
  uint64_t received(int thread) const;
  void arrive_at_barrier(int thread);
  // Throws, as has_exited() does, if a thread has written beyond the end.
  void* shared_memory(size_t size);
  void exit(int thread);

  const uint3 index;
  uint3 thread_index(int thread) const;
  std::string name(int thread) const;
  Fiber& fiber(int thread) const { return *fibers_[thread]; }
  const std::vector<Fiber*>& fibers() const { return fibers_; }

 private:
  void release_warp(int first_thread, const Arrival& arrival);
  void release_barrier();
  [[noreturn]] void report_deadlock() const;

  dim3 size_;
  int alive_;
  int at_barrier_ = 0;
  std::vector<Warp> warps_;
  std::vector<Fiber*> fibers_;
  std::vector<unsigned char> shared_;  // with a margin at the end
};

}  // namespace lite_detr::harness
