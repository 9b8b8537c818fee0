// How the CPU operators run kernels: the instruction set, the tasks and the threads.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../point_tensors.h"
#include "kernels.h"

namespace lite_detr::cpu {

// The kernels for this processor. LITE_DETR_CPU_CAPABILITY=portable, avx2 or avx512 chooses those
// of a lesser one.
const AllKernels& kernels();

template <typename T>
const Kernels<T>& kernels_for();
template <>
inline const Kernels<float>& kernels_for<float>() { return kernels().float32; }
template <>
inline const Kernels<double>& kernels_for<double>() { return kernels().float64; }
template <>
inline const Kernels<Float16>& kernels_for<Float16>() { return kernels().float16; }
template <>
inline const Kernels<BFloat16>& kernels_for<BFloat16>() { return kernels().bfloat16; }

// The kernels for the way in which points are given.
template <typename T>
const PointKernels<T, Locations<T>>& kernels_at(const Locations<T>&) {
  return kernels_for<T>().at_locations;
}
template <typename T>
const PointKernels<T, Offsets<T>>& kernels_at(const Offsets<T>&) {
  return kernels_for<T>().at_offsets;
}

// The numbers of a task's scratch memory.
inline int64_t scratch_size(const KernelGeometry& geometry) {
  return kScratchRows * geometry.channels + round_up(geometry.points, kGroup);
}

inline int64_t padded_channels(int64_t channels) { return round_up(channels, kChannelMultiple); }

// [B, Q, M * D] -> contiguous [B, Q, M, D'], with the channels of kernels.
inline Tensor padded_heads(const Tensor& tensor, const Geometry& geometry) {
  return pad_channels(
      api::view(tensor, {geometry.batch, geometry.queries, geometry.heads, geometry.channels}),
      kChannelMultiple);
}

// [B, Q, M, D'] -> [B, Q, M * D]
inline Tensor joined_heads(const Tensor& tensor, const Geometry& geometry) {
  return api::flatten(api::narrow(tensor, 3, 0, geometry.channels), 2);
}

// The levels of a call, point by point.
class PointLevels {
 public:
  explicit PointLevels(const Geometry& geometry);
  KernelGeometry for_kernel(const Geometry& geometry) const;

 private:
  std::vector<int32_t> level_, width_, height_, start_;
};

// A tensor [B, S, M, D] to read the rows of a head from; empty if there is no separate key.
template <typename T>
struct Source {
  const T* data = nullptr;
  int64_t batch_stride, token_stride, head_stride;
  Tensor tensor;

  Source() = default;
  explicit Source(const Tensor& any)
      : tensor(any.stride(3) == 1 ? any : api::contiguous(any)) {
    data = lite_detr::data<const T>(tensor);
    batch_stride = tensor.stride(0);
    token_stride = tensor.stride(1);
    head_stride = tensor.stride(2);
  }

  TokenRows<const T> slice(int64_t image, int64_t head) const {
    if (data == nullptr) return {nullptr, 0};
    return {data + image * batch_stride + head * head_stride, token_stride};
  }
};

// Memory aligned to cache lines. Raises std::bad_alloc.
void* allocate(size_t bytes);

// Memory that a thread keeps for its next call.
class KeptMemory {
 public:
  // The numbers that were there are lost.
  template <typename T>
  T* reserve(int64_t count) {
    const size_t bytes = count * sizeof(T);
    if (bytes > size_) {
      memory_.reset(allocate(bytes));
      size_ = bytes;
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

// Memory of this thread, for its copies and sums of the value's and the key's rows.
struct ThreadMemory {
  KeptMemory rows[2];
  KeptMemory sums[2];
};
ThreadMemory& thread_memory();

// How many rows ahead of their copy tokens are prefetched.
constexpr int64_t kRowsAhead = 16;

// A thread's contiguous copy of a head's rows. In a usual tensor they are 1 KiB apart, so that they
// would share an eighth of the cache's sets; side by side they fit into it.
//
// Copies and pads rows that will be read more than once; returns others as they are.
template <typename T>
TokenRows<const T> pack(const TokenRows<const T>& rows, const Geometry& geometry, KeptMemory& kept) {
  const int64_t padded = padded_channels(geometry.channels);
  const bool read_often = geometry.queries * geometry.points_in_all() > geometry.tokens;
  if (rows.first == nullptr || (padded == geometry.channels && !read_often)) return rows;
  T* copy = kept.reserve<T>(geometry.tokens * padded);
  const auto bytes = geometry.channels * sizeof(T);
  // With a size that the compiler knows, a copy is a few instructions instead of a call.
  const auto copy_rows = [&](auto size) {
    for (int64_t token = 0; token < geometry.tokens; ++token) {
      const T* source = rows.first + token * rows.stride;
      for (size_t line = 0; line < size; line += 64) {
        __builtin_prefetch(source + kRowsAhead * rows.stride + line / sizeof(T));
      }
      T* target = copy + token * padded;
      std::memcpy(target, source, size);
      std::memset(target + geometry.channels, 0, (padded - geometry.channels) * sizeof(T));
    }
  };
  if (bytes == 128) {
    copy_rows(std::integral_constant<size_t, 128>());
  } else if (bytes == 64) {
    copy_rows(std::integral_constant<size_t, 64>());
  } else {
    copy_rows(bytes);
  }
  return {copy, padded};
}

// Zeros for the gradient of one head's rows, which kernels add to.
template <typename A>
TokenRows<A> clear(const Geometry& geometry, KeptMemory& kept) {
  const int64_t padded = padded_channels(geometry.channels);
  A* sums = kept.reserve<A>(geometry.tokens * padded);
  std::memset(sums, 0, geometry.tokens * padded * sizeof(A));
  return {sums, padded};
}

// Writes these sums to a head's place in a contiguous [B, S, M, D].
template <typename T>
void store_sums(
    const TokenRows<compute_t<T>>& sums, T* gradient, const Geometry& geometry, int64_t image,
    int64_t head) {
  const int64_t stride = geometry.heads * geometry.channels;
  const TokenRows<T> target{
      gradient + image * geometry.tokens * stride + head * geometry.channels, stride};
  kernels_for<T>().store_rows(sums.first, sums.stride, target, geometry.tokens, geometry.channels);
}

// Runs a forward kernel over all queries, in chunks. A result belongs to one query, so that it does
// not depend on the thread that takes the chunk. The chunks of a head follow one another.
template <typename T, typename Tensors>
void run_forward(
    const Geometry& geometry, const Source<T>& value, const Source<T>& key,
    Kernel<T, Tensors> kernel, const Tensors& tensors) {
  constexpr int64_t kQueries = 128;
  const PointLevels levels(geometry);
  const KernelGeometry kernel_geometry = levels.for_kernel(geometry);
  const int64_t chunks = (geometry.queries + kQueries - 1) / kQueries;
  const int64_t slices = geometry.batch * geometry.heads;
  api::parallel_for(0, slices * chunks, 1, [&](int64_t first, int64_t last) {
    std::vector<compute_t<T>> scratch(scratch_size(kernel_geometry));
    ThreadMemory& memory = thread_memory();
    Task<T> task{};
    task.scratch = scratch.data();
    int64_t packed_slice = -1;
    for (int64_t item = first; item < last; ++item) {
      const int64_t slice = item / chunks;
      if (slice != packed_slice) {
        packed_slice = slice;
        task.image = slice / geometry.heads;
        task.head = slice % geometry.heads;
        task.value = pack(value.slice(task.image, task.head), geometry, memory.rows[0]);
        task.key = pack(key.slice(task.image, task.head), geometry, memory.rows[1]);
      }
      task.begin = item % chunks * kQueries;
      task.end = std::min(task.begin + kQueries, geometry.queries);
      kernel(kernel_geometry, task, tensors);
    }
  });
}

// Runs a backward kernel, a head at a time. It adds to the gradient of the head's rows, query by
// query: with one thread for each head, the order of the sums, and so every bit of them, is the
// same for any number of threads.
template <typename T, typename Tensors>
void run_backward(
    const Geometry& geometry, const Source<T>& value, const Source<T>& key, T* grad_value,
    T* grad_key, Kernel<T, Tensors> kernel, const Tensors& tensors) {
  const PointLevels levels(geometry);
  const KernelGeometry kernel_geometry = levels.for_kernel(geometry);
  api::parallel_for(0, geometry.batch * geometry.heads, 1, [&](int64_t first, int64_t last) {
    std::vector<compute_t<T>> scratch(scratch_size(kernel_geometry));
    ThreadMemory& memory = thread_memory();
    Task<T> task{};
    task.scratch = scratch.data();
    task.end = geometry.queries;
    for (int64_t slice = first; slice < last; ++slice) {
      task.image = slice / geometry.heads;
      task.head = slice % geometry.heads;
      task.value = pack(value.slice(task.image, task.head), geometry, memory.rows[0]);
      task.key = pack(key.slice(task.image, task.head), geometry, memory.rows[1]);
      task.grad_value = clear<compute_t<T>>(geometry, memory.sums[0]);
      if (grad_key != nullptr) task.grad_key = clear<compute_t<T>>(geometry, memory.sums[1]);
      kernel(kernel_geometry, task, tensors);
      store_sums(task.grad_value, grad_value, geometry, task.image, task.head);
      if (grad_key != nullptr) {
        store_sums(task.grad_key, grad_key, geometry, task.image, task.head);
      }
    }
  });
}

}  // namespace lite_detr::cpu
