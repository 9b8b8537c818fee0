// "Device memory": the memory that kernels can reach, by checked accesses only.
//
// The same memory is mapped twice. Tensors are in the first view, which is closed while a kernel
// runs, so that dereferencing a pointer without a check faults. Checked accesses go through the
// second view.
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

  // Allocates exactly `size` bytes. There are gaps between blocks, and they are not reused while
  // any other one lives: neither a step past the end nor a dangling pointer finds another block.
  void* allocate(size_t size);
  void free(void* address);

  // The memory of the machine that live blocks really take.
  size_t resident_bytes() const;

  // Returns the place in the second view, for a running kernel. A wrong access throws.
  void* check(const void* address, size_t size, Access access);

  // Whether an address is in device memory, and where it is relative to the nearest live block.
  bool contains(const void* address) const;
  std::string describe(const void* address) const;

  // While a kernel runs: the first view is closed, and nothing is allocated or freed.
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
    bool is_read_only = false;  // the running kernel has read it as read-only
    bool is_written = false;    // the running kernel has written to it
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
  Blocks::iterator last_ = blocks_.end();  // the block of the last access
  mutable std::mutex mutex_;
};

}  // namespace lite_detr::harness
