// How the CPU operators run kernels: the instruction set, the tasks and the threads.
#pragma once

#include <algorithm>
#include <vector>

#include "../point_tensors.h"
#include "packing.h"

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
  PointLevels(const Geometry& geometry, const RowLayout& layout);
  KernelGeometry for_kernel(const Geometry& geometry, const RowLayout& layout) const;

 private:
  std::vector<int32_t> level_, width_, height_, first_, pitch_;
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

// Writes these sums to a head's place in a contiguous [B, S, M, D].
template <typename T>
void store_sums(
    const TokenRows<compute_t<T>>& sums, T* gradient, const Geometry& geometry,
    const RowLayout& layout, int64_t image, int64_t head, int64_t first_level, int64_t end_level) {
  const int64_t stride = geometry.heads * geometry.channels;
  T* first = gradient + image * geometry.tokens * stride + head * geometry.channels;
  for (int64_t i = first_level; i < end_level; ++i) {
    const Level& level = geometry.levels[i];
    for (int64_t row = 0; row < level.height; ++row) {
      const int64_t source = layout.first[i] + row * layout.pitch[i];
      const TokenRows<T> target{first + (level.start + row * level.width) * stride, stride};
      kernels_for<T>().store_rows(
          sums.first + source * sums.stride, sums.stride, target, level.width, geometry.channels);
    }
  }
}

// Runs a forward kernel over all queries, in chunks. A result belongs to one query, so that it does
// not depend on the thread that takes the chunk. The chunks of a head follow one another.
//
// Rows that are read more than once are copied, and get a border; others are read as they are, or
// copied without one if their channels must be padded.
template <typename T, typename Tensors>
void run_forward(
    const Geometry& geometry, const Source<T>& value, const Source<T>& key,
    Kernel<T, Tensors> kernel, const Tensors& tensors) {
  constexpr int64_t kQueries = 128;
  const bool read_often = geometry.queries * geometry.points_in_all() > geometry.tokens;
  const bool copied = read_often || padded_channels(geometry.channels) != geometry.channels;
  const RowLayout layout(geometry, read_often);
  const PointLevels levels(geometry, layout);
  const KernelGeometry kernel_geometry = levels.for_kernel(geometry, layout);
  const int64_t chunks = (geometry.queries + kQueries - 1) / kQueries;
  const int64_t slices = geometry.batch * geometry.heads;
  api::parallel_for(0, slices * chunks, 1, [&](int64_t first, int64_t last) {
    ThreadMemory& memory = thread_memory();
    Task<T> task{};
    task.scratch = memory.scratch.template reserve<char>(scratch_bytes(kernel_geometry));
    int64_t packed_slice = -1;
    for (int64_t item = first; item < last; ++item) {
      const int64_t slice = item / chunks;
      if (slice != packed_slice) {
        packed_slice = slice;
        task.image = slice / geometry.heads;
        task.head = slice % geometry.heads;
        task.value = value.slice(task.image, task.head);
        task.key = key.slice(task.image, task.head);
        if (copied) {
          const int64_t count = geometry.levels.size();
          task.value = pack(task.value, geometry, layout, 0, count, memory.rows[0]);
          if (key.data) {
            task.key = pack(task.key, geometry, layout, 0, count, memory.rows[1]);
          }
        }
      }
      task.begin = item % chunks * kQueries;
      task.end = std::min(task.begin + kQueries, geometry.queries);
      kernel(kernel_geometry, task, tensors);
    }
    memory.trim();
  });
}

// Runs a backward kernel, a head at a time, or a part of its levels if there are more threads than
// heads. It adds to the gradient of the levels' rows, query by query: with one thread for each level
// of a head, the order of the sums, and so every bit of them, is the same for any number of threads.
//
// `grad_query`: null, or [B, Q, M, D], whose levels' parts are added in their order.
template <typename T, typename Tensors>
void run_backward(
    const Geometry& geometry, const Source<T>& value, const Source<T>& key, T* grad_value,
    T* grad_key, T* grad_query, Kernel<T, Tensors> kernel, const Tensors& tensors) {
  using A = compute_t<T>;
  const RowLayout layout(geometry, true);
  const PointLevels levels(geometry, layout);
  const KernelGeometry kernel_geometry = levels.for_kernel(geometry, layout);
  const int64_t slices = geometry.batch * geometry.heads;
  const int64_t count = geometry.levels.size();
  const int64_t parts = slices == 0
      ? 1 : std::min((int64_t(api::get_num_threads()) + slices - 1) / slices, count);
  const int64_t items = slices * geometry.queries, channels = kernel_geometry.channels;
  std::unique_ptr<A[]> level_sums;
  if (grad_query != nullptr && parts > 1) level_sums.reset(new A[count * items * channels]);

  api::parallel_for(0, slices * parts, 1, [&](int64_t first, int64_t last) {
    ThreadMemory& memory = thread_memory();
    Task<T> task{};
    task.scratch = memory.scratch.template reserve<char>(scratch_bytes(kernel_geometry));
    task.end = geometry.queries;
    task.level_sums = level_sums.get();
    task.items = items;
    for (int64_t item = first; item < last; ++item) {
      const int64_t slice = item / parts, part = item % parts;
      const int64_t first_level = part * count / parts, end_level = (part + 1) * count / parts;
      task.image = slice / geometry.heads;
      task.head = slice % geometry.heads;
      task.first_point = first_level * geometry.points;
      task.end_point = end_level * geometry.points;
      const auto pack_levels = [&](const Source<T>& source, KeptMemory& kept) {
        return pack(
            source.slice(task.image, task.head), geometry, layout, first_level, end_level, kept);
      };
      task.value = pack_levels(value, memory.rows[0]);
      task.grad_value = clear<A>(geometry, layout, first_level, end_level, memory.sums[0]);
      if (key.data) {
        task.key = pack_levels(key, memory.rows[1]);
        task.grad_key = clear<A>(geometry, layout, first_level, end_level, memory.sums[1]);
      }
      kernel(kernel_geometry, task, tensors);
      const auto store = [&](const TokenRows<A>& sums, T* gradient) {
        store_sums(
            sums, gradient, geometry, layout, task.image, task.head, first_level, end_level);
      };
      store(task.grad_value, grad_value);
      if (grad_key != nullptr) store(task.grad_key, grad_key);
    }
    memory.trim();
  });

  if (level_sums == nullptr) return;
  constexpr int64_t kItems = 1024;
  api::parallel_for(0, (items + kItems - 1) / kItems, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kItems, end = std::min(last * kItems, items);
    A* totals = level_sums.get();
    for (int64_t level = 1; level < count; ++level) {
      const A* sums = totals + level * items * channels;
      for (int64_t i = begin * channels; i < end * channels; ++i) totals[i] += sums[i];
    }
    const TokenRows<T> target{grad_query + begin * channels, channels};
    kernels_for<T>().store_rows(
        totals + begin * channels, channels, target, end - begin, channels);
  });
}

}  // namespace lite_detr::cpu
