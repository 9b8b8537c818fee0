// The points at which a thread waits for others, of its warp or of its block.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lite_detr::harness {

enum class Intrinsic { shuffle, shuffle_xor, sync_warp };

// A lane's call of an intrinsic of its warp.
struct Arrival {
  Intrinsic intrinsic;
  uint32_t mask;
  int32_t argument;  // the source lane, or its exclusive or with the lane's own number
  int32_t width;
  size_t size;  // of the value, in bytes
  uint64_t value;
};

// Waits until all lanes of the mask have arrived, and returns the value of the source.
uint64_t exchange(const Arrival& arrival);

// Waits until all threads of the block have arrived or exited.
void sync_block();

}  // namespace lite_detr::harness
