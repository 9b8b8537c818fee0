#include "launch.h"

#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "access.h"
#include "block.h"
#include "device_memory.h"
#include "faults.h"
#include "fiber.h"
#include "synchronisation.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace lite_detr::harness {

namespace {

// One launch runs at a time.
std::mutex launching;
Schedule schedule(Order::ascending, 0);
std::vector<Launch> launches;
Counters counters;

// The running thread, and what it threw.
Block* current_block;
int current_thread;
std::exception_ptr thrown;

// Kept from launch to launch: as many as ever ran at once.
std::vector<std::unique_ptr<Fiber>> all_fibers;
std::vector<Fiber*> free_fibers;

void free_all_fibers() {
  free_fibers.clear();
  for (const auto& fiber : all_fibers) free_fibers.push_back(fiber.get());
}

std::vector<Fiber*> take_fibers(size_t count) {
  while (free_fibers.size() < count) {
    all_fibers.push_back(std::make_unique<Fiber>());
    free_fibers.push_back(all_fibers.back().get());
  }
  const std::vector<Fiber*> taken(free_fibers.end() - count, free_fibers.end());
  free_fibers.resize(free_fibers.size() - count);
  return taken;
}

bool is_valid(dim3 grid, dim3 block) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  return grid.x >= 1 && grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= 0xffff && grid.z >= 1 &&
      grid.z <= 0xffff && block.x <= 1024 && block.y <= 1024 && block.z <= 64 && threads >= 1 &&
      threads <= 1024;
}

std::string describe_fault(const Fiber& fiber) {
  const void* address = FaultsCaught::address();
  if (fiber.overflows_at(address)) return "has used up its stack";
  const DeviceMemory& memory = DeviceMemory::instance();
  return "an access " + memory.describe(address) +
      (memory.contains(address) ? ": dereferenced without a checked built-in, such as __ldg" : "");
}

// Runs a thread until it waits, yields or ends.
void run_thread(Block& block, int thread) {
  current_block = &block;
  current_thread = thread;
  blockIdx = block.index;
  threadIdx = block.thread_index(thread);
  Fiber& fiber = block.fiber(thread);
  const Fiber::Stop stop = fiber.resume();
  if (stop == Fiber::Stop::faulted) {
    throw std::runtime_error(block.name(thread) + ": " + describe_fault(fiber));
  }
  if (thrown) std::rethrow_exception(std::exchange(thrown, nullptr));
  if (stop == Fiber::Stop::ended) block.exit(thread);
}

void run_blocks(dim3 grid, dim3 size, const std::function<void()>& kernel) {
  const std::vector<int64_t> numbers = schedule.blocks(int64_t(grid.x) * grid.y * grid.z);
  auto next = numbers.begin();
  std::vector<std::unique_ptr<Block>> blocks;
  while (true) {
    while (blocks.size() < schedule.blocks_at_once() && next != numbers.end()) {
      const int64_t row = *next / grid.x;
      const uint3 index{
          unsigned(*next % grid.x), unsigned(row % grid.y), unsigned(row / grid.y)};
      blocks.push_back(
          std::make_unique<Block>(index, size, take_fibers(size.x * size.y * size.z), kernel));
      ++next;
    }
    if (blocks.empty()) return;
    const int chosen = schedule.first(int(blocks.size()));
    Block& block = *blocks[chosen];
    run_thread(block, block.choose(schedule));
    if (block.has_exited()) {
      free_fibers.insert(free_fibers.end(), block.fibers().begin(), block.fibers().end());
      blocks.erase(blocks.begin() + chosen);
    }
  }
}

}  // namespace

cudaError_t launch(
    dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  if (!is_valid(grid, block)) return cudaErrorInvalidConfiguration;
  if (shared_bytes != 0) throw std::runtime_error("the harness has no dynamic shared memory");
  const std::lock_guard<std::mutex> lock(launching);
  counters = {};
  gridDim = grid;
  blockDim = block;
  free_all_fibers();
  {
    const DeviceMemory::Closed closed(DeviceMemory::instance());
    const FaultsCaught faults_caught;
    run_blocks(grid, block, [&]() {
      try {
        kernel();
      } catch (...) {
        thrown = std::current_exception();
      }
    });
  }
  launches.push_back({grid, block, counters});
  return cudaSuccess;
}

void set_schedule(const Schedule& new_schedule) { schedule = new_schedule; }

std::vector<Launch> take_launches() { return std::exchange(launches, {}); }

void* checked(const void* address, size_t size, Access access) {
  if (schedule.interrupts_access()) Fiber::give_way();
  switch (access) {
    case Access::load:
    case Access::read_only_load:
      ++counters.loads;
      counters.loaded_bytes += int64_t(size);
      break;
    case Access::store:
      ++counters.stores;
      counters.stored_bytes += int64_t(size);
      break;
    case Access::atomic:
      ++counters.atomics;
      counters.atomic_bytes += int64_t(size);
  }
  try {
    return DeviceMemory::instance().check(address, size, access);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(current_block->name(current_thread) + ": " + error.what());
  }
}

uint64_t exchange(const Arrival& arrival) {
  Block& block = *current_block;
  const int thread = current_thread;
  const Intrinsic intrinsic = arrival.intrinsic;
  if (intrinsic == Intrinsic::shuffle || intrinsic == Intrinsic::shuffle_xor) ++counters.shuffles;
  block.arrive(thread, arrival);
  Fiber::give_way();
  return block.received(thread);
}

void* shared_memory(size_t size) { return current_block->shared_memory(size); }

void sync_block() {
  current_block->arrive_at_barrier(current_thread);
  Fiber::give_way();
}

}  // namespace lite_detr::harness
