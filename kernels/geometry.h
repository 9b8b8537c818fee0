// The geometry of a call, which is all its sizes. It is checked before any kernel touches memory:
// mistakes raise ValueError or TypeError.
#pragma once

#include <optional>
#include <vector>

#include "torch_api.h"

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
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights);
Geometry check_key_aware(
    const Tensor& query, const std::optional<Tensor>& key, const Tensor& value,
    const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations);

// The same for operators that take offsets from reference points. `sizes` are the heights and widths
// of the levels in turn.
Geometry check_fused_msda(
    const Tensor& value, Sizes sizes, const Tensor& reference_points,
    const Tensor& sampling_offsets, const Tensor& attention_logits);
Geometry check_fused_key_aware(
    const Tensor& query, const std::optional<Tensor>& key, const Tensor& value,
    Sizes sizes, const Tensor& reference_points, const Tensor& sampling_offsets);

// Checks that a tensor has the given shape, and the dtype and device of another tensor.
void check_like(
    const char* name, const Tensor& tensor, Sizes shape, const char* layout,
    const Tensor& like);

// Checks an output or its gradient, [B, Q, M * D].
void check_output(
    const char* name, const Tensor& tensor, const Geometry& geometry, const Tensor& value);

// Checks a logsumexp [B, Q, M], in the dtype of sums.
void check_logsumexp(
    const Tensor& logsumexp, const Geometry& geometry, const Tensor& value);

// The dtype of locations and sums: float64 for float64, float32 for all others.
ScalarType compute_dtype(ScalarType dtype);

// The unit of an offset from a box, as a share of its width and height: 0.5 / P.
double box_step(const Geometry& geometry);

// The gradients of reference points and of offsets, from that of the points' positions in cells,
// [B, Q, M, L, P, 2].
Tensor grad_references(
    const Tensor& grad_positions, const Tensor& sampling_offsets, const Geometry& geometry,
    const Tensor& reference_points);
Tensor grad_offsets(
    const Tensor& grad_positions, const Tensor& reference_points, const Geometry& geometry,
    ScalarType dtype);

// The scale of key-aware attention's logits, 1 / sqrt(D), where D does not count padding.
double logit_scale(const Geometry& geometry);

// [..., D] -> contiguous [..., D'], with zeros up to a multiple of channels.
Tensor pad_channels(const Tensor& tensor, int64_t multiple);

inline int64_t round_up(int64_t number, int64_t multiple) {
  return (number + multiple - 1) / multiple * multiple;
}

}  // namespace lite_detr
