#include "device_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <system_error>

namespace lite_detr::harness {

namespace {

// Addresses only: pages are allocated when they are first written to.
constexpr size_t kCapacity = size_t(256) << 30;
const size_t kPage = size_t(sysconf(_SC_PAGESIZE));
// Blocks start at multiples of this and of no larger power of two, as in PyTorch's CUDA allocator.
constexpr size_t kAlignment = 512;
// The smallest gap between two blocks.
constexpr size_t kGap = size_t(64) << 10;
// Fresh memory is NaN in every floating-point type, which reveals what a kernel does not write.
// Larger blocks stay zero, so that tensors of several GiB cost nothing.
constexpr int kPoison = 0xff;
constexpr size_t kPoisonedAtMost = size_t(64) << 20;

[[noreturn]] void fail(const char* what) {
  throw std::system_error(errno, std::generic_category(), what);
}

uintptr_t map(int file) {
  void* view = mmap(
      nullptr, kCapacity, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  if (view == MAP_FAILED) fail("no address space for the harness's device memory: mmap");
  return reinterpret_cast<uintptr_t>(view);
}

size_t round_up(size_t number, size_t multiple) {
  return (number + multiple - 1) / multiple * multiple;
}

const char* name(Access access) {
  switch (access) {
    case Access::load:
      return "load";
    case Access::read_only_load:
      return "read-only load";
    case Access::store:
      return "store";
    default:
      return "atomic addition";
  }
}

}  // namespace

DeviceMemory& DeviceMemory::instance() {
  // Never destroyed: tensors may live until the very end of the program.
  static DeviceMemory& memory = *new DeviceMemory;
  return memory;
}

DeviceMemory::DeviceMemory() : file_(memfd_create("device memory", MFD_CLOEXEC)) {
  if (file_ < 0) fail("no file for the harness's device memory: memfd_create");
  if (ftruncate(file_, kCapacity) != 0) fail("the harness's device memory: ftruncate");
  first_view_ = map(file_);
  second_view_ = map(file_);
}

void* DeviceMemory::allocate(size_t size) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t offset = round_up(used_ + kGap, kPage) + kAlignment;
  if (size > kCapacity - kPage || offset > kCapacity - kPage - size) {
    throw std::runtime_error(
        "the harness's device memory is used up: freed memory is reused only when no tensor in it "
        "is left");
  }
  used_ = offset + size;
  const uintptr_t address = first_view_ + offset;
  blocks_.emplace_hint(blocks_.end(), address, Block{size});
  void* block = reinterpret_cast<void*>(address);
  if (size <= kPoisonedAtMost) std::memset(block, kPoison, size);
  return block;
}

void DeviceMemory::free(void* address) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto block = blocks_.find(reinterpret_cast<uintptr_t>(address));
  // No two blocks share a page.
  const size_t begin = (block->first - first_view_) / kPage * kPage;
  const size_t end = round_up(block->first - first_view_ + block->second.size, kPage);
  if (end > begin &&
      fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, begin, end - begin) != 0) {
    fail("the harness's device memory: fallocate");
  }
  if (last_ == block) last_ = blocks_.end();
  blocks_.erase(block);
  if (blocks_.empty()) used_ = 0;
}

size_t DeviceMemory::resident_bytes() const {
  struct stat status;
  if (fstat(file_, &status) != 0) fail("the harness's device memory: fstat");
  return size_t(status.st_blocks) * 512;
}

bool DeviceMemory::contains(const void* address) const {
  return reinterpret_cast<uintptr_t>(address) - first_view_ < kCapacity;
}

DeviceMemory::Blocks::const_iterator DeviceMemory::nearest(uintptr_t address) const {
  const auto after = blocks_.upper_bound(address);
  if (after == blocks_.begin()) return after;
  const auto before = std::prev(after);
  if (after == blocks_.end()) return before;
  const uintptr_t end = before->first + before->second.size;
  return address < end || address - end < after->first - address ? before : after;
}

std::string DeviceMemory::describe(const void* pointer) const {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  std::ostringstream text;
  text << "at " << pointer;
  if (!contains(pointer)) {
    text << ", which is not in device memory";
  } else if (blocks_.empty()) {
    text << ", in device memory without a live block";
  } else {
    const auto block = nearest(address);
    text << ", offset " << int64_t(address - block->first) << " of a block of "
         << block->second.size << " bytes";
  }
  return text.str();
}

void* DeviceMemory::check(const void* pointer, size_t size, Access access) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const auto refuse = [&](const std::string& reason) {
    throw std::runtime_error(
        std::string(name(access)) + " of " + std::to_string(size) + " bytes " +
        describe(pointer) + ": " + reason);
  };
  const auto is_within = [&](Blocks::iterator block) {
    return block != blocks_.end() && address >= block->first && size <= block->second.size &&
        address - block->first <= block->second.size - size;
  };
  if (!is_within(last_)) {
    const auto after = blocks_.upper_bound(address);
    const auto block = after == blocks_.begin() ? blocks_.end() : std::prev(after);
    if (!is_within(block)) refuse("out of bounds");
    last_ = block;
  }
  if (address % size != 0) refuse("not aligned to its size");

  Block& block = last_->second;
  block.is_read_only |= access == Access::read_only_load;
  block.is_written |= access == Access::store || access == Access::atomic;
  if (block.is_read_only && block.is_written) {
    refuse("a launch both reads this block as read-only (__ldg) and writes to it");
  }
  return reinterpret_cast<void*>(address - first_view_ + second_view_);
}

void DeviceMemory::protect(int protection) const {
  void* view = reinterpret_cast<void*>(first_view_);
  if (used_ > 0 && mprotect(view, round_up(used_, kPage), protection) != 0) {
    fail("the harness's device memory: mprotect");
  }
}

DeviceMemory::Closed::Closed(DeviceMemory& memory) : memory_(memory), lock_(memory.mutex_) {
  for (auto& [address, block] : memory.blocks_) block.is_read_only = block.is_written = false;
  memory_.protect(PROT_NONE);
}

DeviceMemory::Closed::~Closed() { memory_.protect(PROT_READ | PROT_WRITE); }

}  // namespace lite_detr::harness
