// How the CPU operators run kernels: the instruction set, the tasks and the threads.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "../geometry.h"
#include "../storage.h"
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

inline int64_t padded_channels(int64_t channels) { return round_up(channels, kChannelMultiple); }

// The levels of a call, point by point.
class PointLevels {
 public:
  explicit PointLevels(const Geometry& geometry);
  KernelGeometry for_kernel(const Geometry& geometry) const;

 private:
  std::vector<int32_t> width_, height_, start_;
};

// A tensor [B, S, M, D] to read the rows of a head from; empty if there is no separate key.
template <typename T>
struct Source {
  const T* data = nullptr;
  int64_t batch_stride, token_stride, head_stride;
  at::Tensor tensor;

  Source() = default;
  explicit Source(const at::Tensor& any)
      : tensor(any.stride(3) == 1 ? any : any.contiguous()) {
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

// A thread's contiguous copy of a head's rows. In a usual tensor they are 1 KiB apart, so that they
// would share an eighth of the cache's sets; side by side they fit into it.
template <typename T>
class PackedRows {
 public:
  // Copies and pads rows that will be read more than once; returns others as they are.
  TokenRows<const T> pack(const TokenRows<const T>& rows, const Geometry& geometry) {
    const int64_t padded = padded_channels(geometry.channels);
    const bool read_often = geometry.queries * geometry.points_in_all() > geometry.tokens;
    if (rows.first == nullptr || (padded == geometry.channels && !read_often)) return rows;
    if (!storage_) storage_.reset(new T[geometry.tokens * padded]);
    for (int64_t token = 0; token < geometry.tokens; ++token) {
      T* target = storage_.get() + token * padded;
      std::memcpy(target, rows.first + token * rows.stride, geometry.channels * sizeof(T));
      std::memset(target + geometry.channels, 0, (padded - geometry.channels) * sizeof(T));
    }
    return {storage_.get(), padded};
  }

 private:
  std::unique_ptr<T[]> storage_;
};

// A thread's sums for the gradient of one head's rows.
template <typename T>
class GradRows {
  using A = compute_t<T>;

 public:
  // Sets the sums to zero.
  TokenRows<A> clear(const Geometry& geometry) {
    const int64_t padded = padded_channels(geometry.channels);
    if (!storage_) storage_.reset(new A[geometry.tokens * padded]);
    std::memset(storage_.get(), 0, geometry.tokens * padded * sizeof(A));
    return {storage_.get(), padded};
  }

  // Writes the sums to a head's place in a contiguous [B, S, M, D].
  void store(T* gradient, const Geometry& geometry, int64_t image, int64_t head) const {
    const int64_t stride = geometry.heads * geometry.channels;
    const TokenRows<T> target{
        gradient + image * geometry.tokens * stride + head * geometry.channels, stride};
    kernels_for<T>().store_rows(
        storage_.get(), padded_channels(geometry.channels), target, geometry.tokens,
        geometry.channels);
  }

 private:
  std::unique_ptr<A[]> storage_;
};

// Runs a forward kernel over all queries, in chunks. A result belongs to one query, so that it does
// not depend on the thread that takes the chunk. The chunks of a head follow one another.
template <typename T, typename Tensors>
void run_forward(
    const Geometry& geometry, const Source<T>& value, const Source<T>& key,
    void (*kernel)(const KernelGeometry&, const Task<T>&, const Tensors&), const Tensors& tensors) {
  constexpr int64_t kQueries = 128;
  const PointLevels levels(geometry);
  const KernelGeometry kernel_geometry = levels.for_kernel(geometry);
  const int64_t chunks = (geometry.queries + kQueries - 1) / kQueries;
  const int64_t slices = geometry.batch * geometry.heads;
  at::parallel_for(0, slices * chunks, 1, [&](int64_t first, int64_t last) {
    std::vector<compute_t<T>> scratch(kScratchRows * kernel_geometry.channels);
    PackedRows<T> packed_value, packed_key;
    Task<T> task{};
    task.scratch = scratch.data();
    int64_t packed_slice = -1;
    for (int64_t item = first; item < last; ++item) {
      const int64_t slice = item / chunks;
      if (slice != packed_slice) {
        packed_slice = slice;
        task.image = slice / geometry.heads;
        task.head = slice % geometry.heads;
        task.value = packed_value.pack(value.slice(task.image, task.head), geometry);
        task.key = packed_key.pack(key.slice(task.image, task.head), geometry);
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
    T* grad_key, void (*kernel)(const KernelGeometry&, const Task<T>&, const Tensors&),
    const Tensors& tensors) {
  const PointLevels levels(geometry);
  const KernelGeometry kernel_geometry = levels.for_kernel(geometry);
  at::parallel_for(0, geometry.batch * geometry.heads, 1, [&](int64_t first, int64_t last) {
    std::vector<compute_t<T>> scratch(kScratchRows * kernel_geometry.channels);
    PackedRows<T> packed_value, packed_key;
    GradRows<T> value_sums, key_sums;
    Task<T> task{};
    task.scratch = scratch.data();
    task.end = geometry.queries;
    for (int64_t slice = first; slice < last; ++slice) {
      task.image = slice / geometry.heads;
      task.head = slice % geometry.heads;
      task.value = packed_value.pack(value.slice(task.image, task.head), geometry);
      task.key = packed_key.pack(key.slice(task.image, task.head), geometry);
      task.grad_value = value_sums.clear(geometry);
      if (grad_key != nullptr) task.grad_key = key_sums.clear(geometry);
      kernel(kernel_geometry, task, tensors);
      value_sums.store(grad_value, geometry, task.image, task.head);
      if (grad_key != nullptr) key_sums.store(grad_key, geometry, task.image, task.head);
    }
  });
}

}  // namespace lite_detr::cpu
