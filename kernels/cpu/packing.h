// A thread's copies of heads and sums of their gradients: where their rows lie, and the memory.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../geometry.h"
#include "kernels.h"

namespace lite_detr::cpu {

inline int64_t padded_channels(int64_t channels) { return round_up(channels, kChannelMultiple); }

// Memory that a thread keeps for its next call, aligned to cache lines and, for the processor's
// table of addresses, in large pages.
class KeptMemory {
 public:
  // The numbers that were there are lost.
  template <typename T>
  T* reserve(int64_t count) {
    const size_t bytes = size_t(count) * sizeof(T);
    if (bytes > size_) {
      size_ = 0;
      memory_.reset();
      const size_t alignment = bytes < kPage ? kLine : kPage;
      const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
      memory_.reset(std::aligned_alloc(alignment, rounded));
      if (memory_ == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
      // It is only an advice: if pages stay small, nothing else changes.
      if (alignment == kPage) madvise(memory_.get(), rounded, MADV_HUGEPAGE);
#endif
      size_ = rounded;
    }
    return static_cast<T*>(memory_.get());
  }

  // Returns what is too large to be kept.
  void trim() {
    if (size_ <= kKept) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  static constexpr size_t kLine = 64, kPage = size_t(2) << 20, kKept = 8 * kPage;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

// Memory of this thread, for its copies and sums of the value's and the key's rows.
struct ThreadMemory {
  KeptMemory rows[2];
  KeptMemory sums[2];
  KeptMemory scratch;

  void trim() {
    for (KeptMemory* memory : {rows, rows + 1, sums, sums + 1, &scratch}) memory->trim();
  }
};
ThreadMemory& thread_memory();

// Where the rows of a head lie. With a border, each level has a row of zeros to the left of each of
// its rows of tokens, which also ends the row above, and a row of tokens of zeros above and below:
// then the corners of a point need no tests. A point outside every map has its corners in the rows
// before the first level.
struct RowLayout {
  bool bordered;
  int64_t count = 0;  // of all rows
  std::vector<int32_t> begin;  // of each level, the border included, and of what comes after
  std::vector<int32_t> first;  // of each level's tokens
  std::vector<int32_t> pitch;  // from a token to the one below

  RowLayout(const Geometry& geometry, bool with_border) : bordered(with_border) {
    int64_t widest = 0;
    for (const Level& level : geometry.levels) widest = std::max<int64_t>(widest, level.width);
    if (bordered) count = widest + 1 - geometry.levels.front().width;
    for (const Level& level : geometry.levels) {
      const int64_t step = int64_t(level.width) + bordered;
      begin.push_back(int32_t(count));
      first.push_back(int32_t(count + (bordered ? step + 1 : 0)));
      pitch.push_back(int32_t(step));
      count += (level.height + 2 * bordered) * step;
      LITE_DETR_CHECK_VALUE(
          count + bordered <= std::numeric_limits<int32_t>::max(),
          "the levels with their borders have more than 2147483647 rows to be numbered");
    }
    begin.push_back(int32_t(count));
    count += bordered;
  }

  // The end of the rows of levels up to `end_level`, with the border that the last one shares.
  int64_t end(int64_t end_level) const { return begin[end_level] + bordered; }
};

// How many rows ahead of their copy tokens are prefetched.
constexpr int64_t kRowsAhead = 16;

// A thread's contiguous copy of a head's rows. In a usual tensor they are 1 KiB apart, so that they
// would share an eighth of the cache's sets; side by side they fit into it. Channels are padded. Only
// levels [first_level, end_level) are copied.
template <typename T>
TokenRows<const T> pack(
    const TokenRows<const T>& rows, const Geometry& geometry, const RowLayout& layout,
    int64_t first_level, int64_t end_level, KeptMemory& kept) {
  const int64_t channels = geometry.channels, padded = padded_channels(channels);
  T* copy = kept.reserve<T>(layout.count * padded);
  const auto clear_rows = [&](int64_t first, int64_t end) {
    std::memset(copy + first * padded, 0, (end - first) * padded * sizeof(T));
  };
  // With a size that the compiler knows, a copy is a few instructions instead of a call.
  const auto copy_rows = [&](auto size, int64_t target, int64_t token, int64_t count) {
    const T* source = rows.first + token * rows.stride;
    T* to = copy + target * padded;
    for (int64_t i = 0; i < count; ++i, source += rows.stride, to += padded) {
      for (size_t line = 0; line < size; line += 64) {
        __builtin_prefetch(source + kRowsAhead * rows.stride + line / sizeof(T));
      }
      std::memcpy(to, source, size);
      std::memset(to + channels, 0, (padded - channels) * sizeof(T));
    }
  };
  const auto copy_levels = [&](auto size) {
    if (first_level > 0) clear_rows(0, layout.first[0]);
    int64_t done = first_level > 0 ? layout.begin[first_level] : 0;
    for (int64_t i = first_level; i < end_level; ++i) {
      const Level& level = geometry.levels[i];
      for (int64_t row = 0; row < level.height; ++row) {
        const int64_t target = layout.first[i] + row * layout.pitch[i];
        clear_rows(done, target);
        copy_rows(size, target, level.start + row * level.width, level.width);
        done = target + level.width;
      }
    }
    clear_rows(done, layout.end(end_level));
  };
  const size_t bytes = channels * sizeof(T);
  if (bytes == 128) {
    copy_levels(std::integral_constant<size_t, 128>());
  } else if (bytes == 64) {
    copy_levels(std::integral_constant<size_t, 64>());
  } else {
    copy_levels(bytes);
  }
  return {copy, padded};
}

// Zeros for the gradient of the rows of a head's levels, which kernels add to.
template <typename A>
TokenRows<A> clear(
    const Geometry& geometry, const RowLayout& layout, int64_t first_level, int64_t end_level,
    KeptMemory& kept) {
  const int64_t padded = padded_channels(geometry.channels);
  A* sums = kept.reserve<A>(layout.count * padded);
  const int64_t first = layout.begin[first_level], end = layout.end(end_level);
  std::memset(sums, 0, layout.first[0] * padded * sizeof(A));
  std::memset(sums + first * padded, 0, (end - first) * padded * sizeof(A));
  return {sums, padded};
}

}  // namespace lite_detr::cpu
