// What all threads of a launch did, in total.
#pragma once

#include <cstdint>

namespace lite_detr::harness {

struct Counters {
  int64_t loads = 0;
  int64_t loaded_bytes = 0;
  int64_t stores = 0;
  int64_t stored_bytes = 0;
  int64_t atomics = 0;
  int64_t atomic_bytes = 0;
  int64_t shuffles = 0;
};

}  // namespace lite_detr::harness
