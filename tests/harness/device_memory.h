// "Device memory": what a kernel can reach, and only by checked accesses.
//
// The same memory stands at two places. Tensors live in the first view, which is closed while a
// kernel runs, so that a pointer which is dereferenced without a check faults. Checked accesses go
// through the second view.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "access.h"

namespace lite_detr::harness {

class DeviceMemory {
 public:
  static DeviceMemory& instance();

  // A block of exactly so many bytes. Blocks lie apart and are not used again while any other one
  // lives, so that neither a step past the end nor a pointer to what was freed finds another.
  void* allocate(size_t size);
  void free(void* address);

  // Of the blocks that live, what the machine really holds.
  size_t resident_bytes() const;

  // The place in the second view, for a kernel that runs. What is wrong with an access throws.
  void* check(const void* address, size_t size, Access access);

  // Whether tensors can live at an address, and where it is from the nearest block that lives.
  bool contains(const void* address) const;
  std::string describe(const void* address) const;

  // The time in which a kernel runs: the first view is closed, and nothing is allocated or freed.
  class Closed {
   public:
    explicit Closed(DeviceMemory& memory);
    ~Closed();

   private:
    DeviceMemory& memory_;
    std::lock_guard<std::mutex> lock_;
  };

 private:
  struct Block {
    size_t size;
    bool is_read_only = false;  // to the kernel that runs, which has read it as such
    bool is_written = false;    // by the kernel that runs
  };
  // By address.
  using Blocks = std::map<uintptr_t, Block>;

  DeviceMemory();
  Blocks::const_iterator nearest(uintptr_t address) const;
  void protect(int protection) const;

  int file_;
  uintptr_t first_view_;
  uintptr_t second_view_;
  size_t used_ = 0;
  Blocks blocks_;
  Blocks::iterator last_ = blocks_.end();  // that was accessed
  mutable std::mutex mutex_;
};

}  // namespace lite_detr::harness
