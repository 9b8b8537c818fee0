// The points at which a thread waits for others, of its warp or of its block.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lite_detr::harness {

enum class Intrinsic { shuffle, shuffle_xor, vote_all, sync_warp };

// A lane's call of an intrinsic of its warp.
struct Arrival {
  Intrinsic intrinsic;
  uint32_t mask;
  int32_t argument;  // of a shuffle: the source lane, or its exclusive or with the lane's own number
  int32_t width;
  size_t size;  // of the value, in bytes
  uint64_t value;
};

// Waits until all lanes of the mask have arrived, and returns the value of the source, or of a vote.
uint64_t exchange(const Arrival& arrival);

// The shared memory of the running thread's block, which is NaN until it is written. A kernel has one
// size.
void* shared_memory(size_t size);

// Waits until all threads of the block have arrived or exited.
void sync_block();

}  // namespace lite_detr::harness
