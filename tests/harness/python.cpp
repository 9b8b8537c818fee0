// The functions that tests/helpers/cuda_harness.py calls.
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "device_memory.h"
#include "launch.h"

namespace lite_detr::harness {

namespace {

// Allocates CPU tensors in device memory.
class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    void* block = size == 0 ? nullptr : DeviceMemory::instance().allocate(size);
    return {block, block, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, size_t size) const override {
    default_copy_data(target, source, size);
  }

 private:
  static void release(void* block) {
    if (block != nullptr) DeviceMemory::instance().free(block);
  }
};

Allocator allocator;
// PyTorch's own, while ours replaces it.
c10::Allocator* previous_allocator = nullptr;

// Returns false if it had been entered before.
bool enter_device_memory() {
  if (previous_allocator != nullptr) return false;
  previous_allocator = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&allocator);
  return true;
}

void exit_device_memory() {
  c10::SetCPUAllocator(std::exchange(previous_allocator, nullptr));
}

int64_t resident_bytes() { return int64_t(DeviceMemory::instance().resident_bytes()); }

void set_order(const std::string& order, int64_t seed) {
  TORCH_CHECK_VALUE(
      order == "ascending" || order == "descending" || order == "random",
      "the order must be ascending, descending or random, got ", order);
  set_schedule(Schedule(
      order == "ascending" ? Order::ascending
                           : order == "descending" ? Order::descending : Order::random,
      uint64_t(seed)));
}

c10::List<c10::Dict<std::string, int64_t>> counters() {
  c10::List<c10::Dict<std::string, int64_t>> all;
  for (const Launch& launch : take_launches()) {
    c10::Dict<std::string, int64_t> one;
    one.insert("blocks", int64_t(launch.grid.x) * launch.grid.y * launch.grid.z);
    one.insert("threads", int64_t(launch.block.x) * launch.block.y * launch.block.z);
    one.insert("loads", launch.counters.loads);
    one.insert("loaded_bytes", launch.counters.loaded_bytes);
    one.insert("stores", launch.counters.stores);
    one.insert("stored_bytes", launch.counters.stored_bytes);
    one.insert("atomics", launch.counters.atomics);
    one.insert("atomic_bytes", launch.counters.atomic_bytes);
    one.insert("shuffles", launch.counters.shuffles);
    all.push_back(one);
  }
  return all;
}

}  // namespace

TORCH_LIBRARY(lite_detr_harness, library) {
  library.def("enter_device_memory", &enter_device_memory);
  library.def("exit_device_memory", &exit_device_memory);
  library.def("resident_bytes", &resident_bytes);
  library.def("set_order", &set_order);
  library.def("counters", &counters);
}

}  // namespace lite_detr::harness
