// The geometry of a call, which is all its sizes. It is checked before any kernel touches memory:
// mistakes raise ValueError or TypeError.
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

struct Geometry {
  int64_t batch;     // B
  int64_t tokens;    // S
  int64_t heads;     // M
  int64_t channels;  // D, of a head
  int64_t queries;   // Q
  int64_t points;    // P, on each level
  std::vector<Level> levels;

  int64_t points_in_all() const { return int64_t(levels.size()) * points; }
};

// Check the arguments of an operator, on any device, and return their geometry.
Geometry check_msda(
    const at::Tensor& value, const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations, const at::Tensor& attention_weights);
Geometry check_key_aware(
    const at::Tensor& query, const std::optional<at::Tensor>& key, const at::Tensor& value,
    const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations);

// Checks that a tensor has the given shape, and the dtype and device of another tensor.
void check_like(
    const char* name, const at::Tensor& tensor, at::IntArrayRef shape, const char* layout,
    const at::Tensor& like);

// Checks an output or its gradient, [B, Q, M * D].
void check_output(
    const char* name, const at::Tensor& tensor, const Geometry& geometry, const at::Tensor& value);

// The dtype of locations and sums: float64 for float64, float32 for all others.
at::ScalarType compute_dtype(at::ScalarType dtype);

// The scale of key-aware attention's logits, 1 / sqrt(D), where D does not count padding.
double logit_scale(const Geometry& geometry);

// [..., D] -> contiguous [..., D'], with zeros up to a multiple of channels.
at::Tensor pad_channels(const at::Tensor& tensor, int64_t multiple);

inline int64_t round_up(int64_t number, int64_t multiple) {
  return (number + multiple - 1) / multiple * multiple;
}

}  // namespace lite_detr
