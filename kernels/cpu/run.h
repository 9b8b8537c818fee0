// How the CPU operators run the kernels: which instruction set, in which tasks, on which threads.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "../problem.h"
#include "../storage.h"
#include "kernels.h"

namespace lite_detr::cpu {

// The kernels for this processor. LITE_DETR_CPU_CAPABILITY=portable, avx2 or avx512 asks for those
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

// The levels of a problem, point by point, as the kernels want them.
class PointLevels {
 public:
  explicit PointLevels(const Problem& problem);
  Geometry geometry(const Problem& problem) const;

 private:
  std::vector<int32_t> width_, height_, start_;
};

// A tensor [B, S, M, D] of which a head's rows are wanted; none where there are no keys.
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

  Rows<const T> slice(int64_t image, int64_t head) const {
    if (data == nullptr) return {nullptr, 0};
    return {data + image * batch_stride + head * head_stride, token_stride};
  }
};

// A thread's copy of a head's rows, one behind the other. A head's tokens are 1 KiB apart in a usual
// tensor, so that they would share an eighth of a cache's sets; side by side they fit into it.
template <typename T>
class PackedRows {
 public:
  // Copies rows that are going to be read more than once, and pads them; returns others as they are.
  Rows<const T> pack(const Rows<const T>& rows, const Problem& problem) {
    const int64_t padded = padded_channels(problem.channels);
    const bool read_often = problem.queries * problem.points_in_all() > problem.tokens;
    if (rows.first == nullptr || (padded == problem.channels && !read_often)) return rows;
    if (!storage_) storage_.reset(new T[problem.tokens * padded]);
    for (int64_t token = 0; token < problem.tokens; ++token) {
      T* target = storage_.get() + token * padded;
      std::memcpy(target, rows.first + token * rows.stride, problem.channels * sizeof(T));
      std::memset(target + problem.channels, 0, (padded - problem.channels) * sizeof(T));
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
  // Zeros to add to.
  Rows<A> clear(const Problem& problem) {
    const int64_t padded = padded_channels(problem.channels);
    if (!storage_) storage_.reset(new A[problem.tokens * padded]);
    std::memset(storage_.get(), 0, problem.tokens * padded * sizeof(A));
    return {storage_.get(), padded};
  }

  // Writes the sums to a head's place in a contiguous [B, S, M, D].
  void store(T* gradient, const Problem& problem, int64_t image, int64_t head) const {
    const int64_t stride = problem.heads * problem.channels;
    const Rows<T> target{
        gradient + image * problem.tokens * stride + head * problem.channels, stride};
    kernels_for<T>().store_rows(
        storage_.get(), padded_channels(problem.channels), target, problem.tokens,
        problem.channels);
  }

 private:
  std::unique_ptr<A[]> storage_;
};

// Runs a forward kernel over all queries, chunk by chunk. Every result is of one query, so that it
// does not depend on which thread takes the chunk. The chunks of a head follow one another.
template <typename T, typename Tensors>
void run_forward(
    const Problem& problem, const Source<T>& value, const Source<T>& key,
    void (*kernel)(const Geometry&, const Task<T>&, const Tensors&), const Tensors& tensors) {
  constexpr int64_t kQueries = 128;
  const PointLevels levels(problem);
  const Geometry geometry = levels.geometry(problem);
  const int64_t chunks = (problem.queries + kQueries - 1) / kQueries;
  const int64_t slices = problem.batch * problem.heads;
  at::parallel_for(0, slices * chunks, 1, [&](int64_t first, int64_t last) {
    std::vector<compute_t<T>> scratch(kScratchRows * geometry.channels);
    PackedRows<T> packed_value, packed_key;
    Task<T> task{};
    task.scratch = scratch.data();
    int64_t packed_slice = -1;
    for (int64_t item = first; item < last; ++item) {
      const int64_t slice = item / chunks;
      if (slice != packed_slice) {
        packed_slice = slice;
        task.image = slice / problem.heads;
        task.head = slice % problem.heads;
        task.value = packed_value.pack(value.slice(task.image, task.head), problem);
        task.key = packed_key.pack(key.slice(task.image, task.head), problem);
      }
      task.begin = item % chunks * kQueries;
      task.end = std::min(task.begin + kQueries, problem.queries);
      kernel(geometry, task, tensors);
    }
  });
}

// Runs a backward kernel head by head. It adds to the gradient of its head's rows, query by query:
// one thread for each head makes the order of the sums, and so every bit of them, the same on any
// number of threads.
template <typename T, typename Tensors>
void run_backward(
    const Problem& problem, const Source<T>& value, const Source<T>& key, T* grad_value,
    T* grad_key, void (*kernel)(const Geometry&, const Task<T>&, const Tensors&),
    const Tensors& tensors) {
  const PointLevels levels(problem);
  const Geometry geometry = levels.geometry(problem);
  at::parallel_for(0, problem.batch * problem.heads, 1, [&](int64_t first, int64_t last) {
    std::vector<compute_t<T>> scratch(kScratchRows * geometry.channels);
    PackedRows<T> packed_value, packed_key;
    GradRows<T> value_sums, key_sums;
    Task<T> task{};
    task.scratch = scratch.data();
    task.end = problem.queries;
    for (int64_t slice = first; slice < last; ++slice) {
      task.image = slice / problem.heads;
      task.head = slice % problem.heads;
      task.value = packed_value.pack(value.slice(task.image, task.head), problem);
      task.key = packed_key.pack(key.slice(task.image, task.head), problem);
      task.grad_value = value_sums.clear(problem);
      if (grad_key != nullptr) task.grad_key = key_sums.clear(problem);
      kernel(geometry, task, tensors);
      value_sums.store(grad_value, problem, task.image, task.head);
      if (grad_key != nullptr) key_sums.store(grad_key, problem, task.image, task.head);
    }
  });
}

}  // namespace lite_detr::cpu
