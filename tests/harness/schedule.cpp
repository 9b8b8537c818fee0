#include "schedule.h"

#include <algorithm>
#include <numeric>

namespace lite_detr::harness {

std::vector<int64_t> Schedule::blocks(int64_t count) {
  std::vector<int64_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (order_ == Order::descending) std::reverse(numbers.begin(), numbers.end());
  if (order_ == Order::random) std::shuffle(numbers.begin(), numbers.end(), random_);
  return numbers;
}

int Schedule::first(int count) {
  switch (order_) {
    case Order::ascending:
      return 0;
    case Order::descending:
      return count - 1;
    default:
      return int(random_() % uint64_t(count));
  }
}

int Schedule::bit(uint32_t bits) {
  for (int skipped = first(__builtin_popcount(bits)); skipped > 0; --skipped) bits &= bits - 1;
  return __builtin_ctz(bits);
}

}  // namespace lite_detr::harness
