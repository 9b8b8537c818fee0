// Every access of a kernel to device memory comes through here.
#pragma once

#include <cstddef>

namespace lite_detr::harness {

enum class Access { load, read_only_load, store, atomic };

// Where the running thread can read or write so many bytes at an address in device memory. An
// access that is not whole within one tensor's memory, or not aligned to its size, ends the launch.
void* checked(const void* address, size_t size, Access access);

}  // namespace lite_detr::harness
