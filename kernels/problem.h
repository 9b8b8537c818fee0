// The sizes of a call, checked before any kernel touches memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace lite_detr {

struct Level {
  int32_t height;
  int32_t width;
  int32_t start;
};

struct Problem {
  int64_t batch;     // B
  int64_t tokens;    // S
  int64_t heads;     // M
  int64_t channels;  // D, of a head
  int64_t queries;   // Q
  int64_t points;    // P, on each level
  std::vector<Level> levels;

  int64_t points_in_all() const { return int64_t(levels.size()) * points; }
};

// Checks the tensors that both attentions take; what is wrong raises ValueError or TypeError.
// Shapes and starts that lie on a device are copied to the host.
Problem check_sampling(
    const at::Tensor& value, const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations);

// Checks that a tensor has a shape, and the dtype and device of the value.
void check_like(
    const char* name, const at::Tensor& tensor, at::IntArrayRef shape, const char* layout,
    const at::Tensor& value);

}  // namespace lite_detr
