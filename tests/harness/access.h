// Every access of a kernel to device memory comes through here.
#pragma once

#include <cstddef>

namespace lite_detr::harness {

enum class Access { load, read_only_load, store, atomic };

// Returns where the running thread can access `size` bytes of device memory. An access that is not
// entirely within one tensor's memory, or not aligned to its size, ends the launch.
void* checked(const void* address, size_t size, Access access);

}  // namespace lite_detr::harness
