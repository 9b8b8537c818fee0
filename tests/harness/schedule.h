// In which order the threads of a kernel run, where it leaves that open.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace lite_detr::harness {

enum class Order { ascending, descending, random };

// Ascending, the first thread that can run always does, and descending the last one: a thread goes
// from one point of synchronisation to the next by itself, and so does a block from its beginning
// to its end. In random order any thread of a few blocks is next, and threads also change before
// about every fourth access to memory.
class Schedule {
 public:
  Schedule(Order order, uint64_t seed) : order_(order), random_(seed) {}

  // All numbers below a count.
  std::vector<int64_t> blocks(int64_t count);
  // Of these, so many run at a time.
  size_t blocks_at_once() const { return order_ == Order::random ? 4 : 1; }
  // The number below a count with which a search begins, and the step to the next one.
  int first(int count);
  int step() const { return order_ == Order::descending ? -1 : 1; }
  // One of the bits that are set, of which there is one at least.
  int bit(uint32_t bits);
  // Whether threads change before an access to memory.
  bool interrupts_access() { return order_ == Order::random && random_() % 4 == 0; }

 private:
  Order order_;
  std::minstd_rand random_;
};

}  // namespace lite_detr::harness
