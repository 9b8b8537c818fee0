// The order in which the threads of a kernel run, as far as the kernel leaves it open.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace lite_detr::harness {

enum class Order { ascending, descending, random };

// In ascending order the first thread that can run is next, in descending order the last one. So a
// thread runs from one point of synchronisation to the next without interruption, and a block from
// its beginning to its end. In random order any thread of a few blocks is next, and threads also
// change before about every fourth access to memory.
class Schedule {
 public:
  Schedule(Order order, uint64_t seed) : order_(order), random_(seed) {}

  // All numbers below `count`, in the order of blocks.
  std::vector<int64_t> blocks(int64_t count);
  // How many blocks run at a time.
  size_t blocks_at_once() const { return order_ == Order::random ? 4 : 1; }
  // Where a search below `count` starts, and the step to the next number.
  int first(int count);
  int step() const { return order_ == Order::descending ? -1 : 1; }
  // Chooses one of the bits that are set, of which there must be one.
  int bit(uint32_t bits);
  // Whether threads change before an access to memory.
  bool interrupts_access() { return order_ == Order::random && random_() % 4 == 0; }

 private:
  Order order_;
  std::minstd_rand random_;
};

}  // namespace lite_detr::harness
