#include "block.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace lite_detr::harness {

namespace {

bool is_same(const Arrival& a, const Arrival& b) {
  return a.intrinsic == b.intrinsic && a.mask == b.mask && a.size == b.size;
}

std::string describe(const Arrival& arrival) {
  std::ostringstream text;
  switch (arrival.intrinsic) {
    case Intrinsic::shuffle:
      text << "__shfl_sync of " << arrival.size << " bytes";
      break;
    case Intrinsic::shuffle_xor:
      text << "__shfl_xor_sync of " << arrival.size << " bytes";
      break;
    case Intrinsic::vote_all:
      text << "__all_sync";
      break;
    case Intrinsic::sync_warp:
      text << "__syncwarp";
  }
  text << " with mask 0x" << std::hex << arrival.mask;
  return text.str();
}

// The lane that a shuffle reads from, as the hardware computes it.
int source_lane(int lane, const Arrival& arrival) {
  const int in_segment = arrival.width - 1;
  if (arrival.intrinsic == Intrinsic::shuffle) {
    return (lane & ~in_segment) | (arrival.argument & in_segment);
  }
  const int source = lane ^ (arrival.argument & (kWarpSize - 1));
  // Lanes can read from segments before their own, but not from those after it.
  return source <= (lane | in_segment) ? source : lane;
}

std::string triple(uint3 index) {
  std::ostringstream text;
  text << "(" << index.x << ", " << index.y << ", " << index.z << ")";
  return text.str();
}

bool holds(uint32_t lanes, int lane) { return lanes >> lane & 1; }

// Beyond the end of shared memory.
constexpr size_t kMargin = 1024;

}  // namespace

uint32_t Warp::missing(const Arrival& arrival) const {
  uint32_t lanes = arrival.mask & ~exited;
  if ((lanes & ~waiting) != 0) return lanes & ~waiting;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (holds(lanes, lane) && is_same(arrivals[lane], arrival)) lanes &= ~(1u << lane);
  }
  return lanes;
}

Block::Block(
    uint3 index, dim3 size, std::vector<Fiber*> fibers, const std::function<void()>& kernel)
    : index(index),
      size_(size),
      alive_(size.x * size.y * size.z),
      warps_((alive_ + kWarpSize - 1) / kWarpSize),
      fibers_(std::move(fibers)) {
  for (int thread = 0; thread < int(warps_.size()) * kWarpSize; ++thread) {
    Warp& warp = warps_[thread / kWarpSize];
    (thread < alive_ ? warp.ready : warp.exited) |= 1u << thread % kWarpSize;
    if (thread < alive_) fibers_[thread]->begin(kernel);
  }
}

bool Block::has_exited() const {
  if (alive_ != 0) return false;
  for (size_t i = shared_.size() - std::min(shared_.size(), kMargin); i < shared_.size(); ++i) {
    if (shared_[i] != 0xff) {
      throw std::runtime_error(
          "block " + triple(index) + " has written beyond the end of its shared memory");
    }
  }
  return true;
}

void* Block::shared_memory(size_t size) {
  // All bits set are NaN in every type.
  if (shared_.empty()) shared_.resize(size + kMargin, 0xff);
  if (shared_.size() != size + kMargin) {
    throw std::runtime_error("the harness has one array of shared memory for each kernel");
  }
  return shared_.data();
}

int Block::choose(Schedule& schedule) const {
  const int count = int(warps_.size());
  int warp = schedule.first(count);
  for (int tried = 0; tried < count; ++tried) {
    if (warps_[warp].ready != 0) return warp * kWarpSize + schedule.bit(warps_[warp].ready);
    warp = (warp + schedule.step() + count) % count;
  }
  report_deadlock();
}

void Block::arrive(int thread, const Arrival& arrival) {
  const int lane = thread % kWarpSize;
  const int width = arrival.width;
  if (width <= 0 || width > kWarpSize || (width & (width - 1)) != 0) {
    throw std::runtime_error(
        name(thread) + ": " + describe(arrival) + " has a width of " + std::to_string(width) +
        ", which is not a power of two up to 32");
  }
  if (!holds(arrival.mask, lane)) {
    throw std::runtime_error(
        name(thread) + ": " + describe(arrival) + " does not name the lane that calls it, " +
        std::to_string(lane));
  }
  Warp& warp = warps_[thread / kWarpSize];
  warp.arrivals[lane] = arrival;
  warp.ready &= ~(1u << lane);
  warp.waiting |= 1u << lane;
  release_warp(thread - lane, arrival);
}

uint64_t Block::received(int thread) const {
  return warps_[thread / kWarpSize].received[thread % kWarpSize];
}

void Block::arrive_at_barrier(int thread) {
  Warp& warp = warps_[thread / kWarpSize];
  const uint32_t bit = 1u << thread % kWarpSize;
  warp.ready &= ~bit;
  warp.at_barrier |= bit;
  ++at_barrier_;
  release_barrier();
}

void Block::exit(int thread) {
  Warp& warp = warps_[thread / kWarpSize];
  const int lane = thread % kWarpSize;
  warp.ready &= ~(1u << lane);
  warp.exited |= 1u << lane;
  --alive_;
  // Release the lanes that waited for this one only.
  for (int other = 0; other < kWarpSize; ++other) {
    if (holds(warp.waiting, other) && holds(warp.arrivals[other].mask, lane)) {
      release_warp(thread - lane, Arrival(warp.arrivals[other]));
    }
  }
  release_barrier();
}

void Block::release_warp(int first_thread, const Arrival& arrival) {
  Warp& warp = warps_[first_thread / kWarpSize];
  if (warp.missing(arrival) != 0) return;
  const uint32_t present = arrival.mask & ~warp.exited;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!holds(present, lane) || arrival.intrinsic == Intrinsic::sync_warp) continue;
    if (arrival.intrinsic == Intrinsic::vote_all) {
      warp.received[lane] = 1;
      for (int other = 0; other < kWarpSize; ++other) {
        if (holds(present, other)) warp.received[lane] &= warp.arrivals[other].value;
      }
      continue;
    }
    const int source = source_lane(lane, warp.arrivals[lane]);
    if (!holds(present, source)) {
      const char* reason = holds(arrival.mask, source) ? "has exited" : "is not in the mask";
      throw std::runtime_error(
          name(first_thread + lane) + ": " + describe(arrival) + " reads from lane " +
          std::to_string(source) + ", which " + reason);
    }
    warp.received[lane] = warp.arrivals[source].value;
  }
  warp.waiting &= ~present;
  warp.ready |= present;
}

void Block::release_barrier() {
  if (at_barrier_ < alive_) return;
  for (Warp& warp : warps_) {
    warp.ready |= warp.at_barrier;
    warp.at_barrier = 0;
  }
  at_barrier_ = 0;
}

void Block::report_deadlock() const {
  // If all were at the barrier, it would have released them.
  int first = 0;
  while (warps_[first].waiting == 0) ++first;
  const Warp& warp = warps_[first];
  const int lane = __builtin_ctz(warp.waiting);
  const int missing = __builtin_ctz(warp.missing(warp.arrivals[lane]));
  const std::string place = holds(warp.at_barrier, missing)
      ? "__syncthreads"
      : describe(warp.arrivals[missing]);
  throw std::runtime_error(
      name(first * kWarpSize + lane) + ": waits forever at " + describe(warp.arrivals[lane]) +
      " for lane " + std::to_string(missing) + ", which waits at " + place);
}

uint3 Block::thread_index(int thread) const {
  const unsigned int row = thread / size_.x;
  return {thread % size_.x, row % size_.y, row / size_.y};
}

std::string Block::name(int thread) const {
  return "block " + triple(index) + ", thread " + triple(thread_index(thread));
}

}  // namespace lite_detr::harness
