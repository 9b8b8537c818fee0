#include "geometry.h"

#include <ATen/ops/constant_pad_nd.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>

namespace lite_detr {

namespace {

std::vector<Level> check_levels(
    const at::Tensor& spatial_shapes, const at::Tensor& level_start_index, int64_t tokens) {
  TORCH_CHECK_VALUE(
      spatial_shapes.dim() == 2 && spatial_shapes.size(1) == 2 && spatial_shapes.size(0) > 0,
      "spatial_shapes must be [L, 2] with L >= 1, got ", spatial_shapes.sizes());
  const int64_t count = spatial_shapes.size(0);
  TORCH_CHECK_VALUE(
      level_start_index.dim() == 1 && level_start_index.size(0) == count,
      "level_start_index must be [L] = [", count, "], got ", level_start_index.sizes());
  TORCH_CHECK_TYPE(
      spatial_shapes.scalar_type() == at::kLong, "spatial_shapes must be torch.int64, got ",
      spatial_shapes.scalar_type());
  TORCH_CHECK_TYPE(
      level_start_index.scalar_type() == at::kLong, "level_start_index must be torch.int64, got ",
      level_start_index.scalar_type());
  TORCH_CHECK_VALUE(
      tokens <= std::numeric_limits<int32_t>::max(),
      "the value has S = ", tokens, " tokens; at most 2147483647 can be numbered");

  const at::Tensor shapes = spatial_shapes.cpu().contiguous();
  const at::Tensor starts = level_start_index.cpu().contiguous();
  const int64_t* shape = shapes.const_data_ptr<int64_t>();
  const int64_t* start = starts.const_data_ptr<int64_t>();
  std::vector<Level> levels;
  int64_t end = 0;
  for (int64_t level = 0; level < count; ++level) {
    const int64_t height = shape[2 * level], width = shape[2 * level + 1];
    TORCH_CHECK_VALUE(
        height > 0 && width > 0, "every level needs a positive height and width, got ", height,
        " x ", width, " for level ", level);
    TORCH_CHECK_VALUE(
        start[level] == end, "level_start_index[", level, "] must be ", end,
        ", where the levels before it end, got ", start[level]);
    // By division, as the product of the given numbers may overflow.
    TORCH_CHECK_VALUE(
        height <= (tokens - end) / width, "level ", level, " of ", height, " x ", width,
        " that starts at token ", end, " reaches past the value's S = ", tokens, " tokens");
    levels.push_back({int32_t(height), int32_t(width), int32_t(end)});
    end += height * width;
  }
  TORCH_CHECK_VALUE(
      end == tokens, "the levels have ", end, " tokens in all, but the value has S = ", tokens);
  return levels;
}

// Checks what both attentions take. Level tensors on a device are copied to the host.
Geometry check_sampling(
    const at::Tensor& value, const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations) {
  TORCH_CHECK_VALUE(
      value.dim() == 4 && value.size(3) > 0, "value must be [B, S, M, D] with D >= 1, got shape ",
      value.sizes());
  const at::ScalarType dtype = value.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
      "value must be float32, float64, float16 or bfloat16, got ", dtype);

  // A CPU's value with levels on another device would reach that device's kernels.
  for (const at::Tensor& levels : {spatial_shapes, level_start_index}) {
    TORCH_CHECK_VALUE(
        levels.is_cpu() || levels.device() == value.device(),
        "spatial_shapes and level_start_index must be on the CPU or on the value's device ",
        value.device(), ", got ", levels.device());
  }

  Geometry geometry;
  geometry.batch = value.size(0);
  geometry.tokens = value.size(1);
  geometry.heads = value.size(2);
  geometry.channels = value.size(3);
  geometry.levels = check_levels(spatial_shapes, level_start_index, geometry.tokens);

  const at::IntArrayRef shape = sampling_locations.sizes();
  TORCH_CHECK_VALUE(
      shape.size() == 6 && shape[0] == geometry.batch && shape[2] == geometry.heads &&
          shape[3] == int64_t(geometry.levels.size()) && shape[5] == 2,
      "sampling_locations must be [B, Q, M, L, P, 2] with B = ", geometry.batch,
      ", M = ", geometry.heads, ", L = ", geometry.levels.size(), ", got ", shape);
  TORCH_CHECK_TYPE(
      sampling_locations.scalar_type() == dtype || sampling_locations.scalar_type() == at::kFloat,
      "sampling_locations must be ", dtype, " (as the value) or Float, got ",
      sampling_locations.scalar_type());
  TORCH_CHECK_VALUE(
      sampling_locations.device() == value.device(),
      "sampling_locations must be on the value's device ", value.device(), ", got ",
      sampling_locations.device());
  TORCH_CHECK_VALUE(
      shape[4] > 0, "sampling_locations must hold at least one point a level, got ", shape);
  geometry.queries = shape[1];
  geometry.points = shape[4];
  return geometry;
}

}  // namespace

void check_like(
    const char* name, const at::Tensor& tensor, at::IntArrayRef shape, const char* layout,
    const at::Tensor& like) {
  TORCH_CHECK_VALUE(
      tensor.sizes() == shape, name, " must be ", layout, " = ", shape, ", got ", tensor.sizes());
  TORCH_CHECK_TYPE(
      tensor.scalar_type() == like.scalar_type(), name, " must have the value's dtype ",
      like.scalar_type(), ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(
      tensor.device() == like.device(), name, " must be on the value's device ", like.device(),
      ", got ", tensor.device());
}

Geometry check_msda(
    const at::Tensor& value, const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  const Geometry geometry =
      check_sampling(value, spatial_shapes, level_start_index, sampling_locations);
  check_like(
      "attention_weights", attention_weights, sampling_locations.sizes().slice(0, 5),
      "[B, Q, M, L, P]", value);
  return geometry;
}

Geometry check_key_aware(
    const at::Tensor& query, const std::optional<at::Tensor>& key, const at::Tensor& value,
    const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations) {
  const Geometry geometry =
      check_sampling(value, spatial_shapes, level_start_index, sampling_locations);
  check_like(
      "query", query, {geometry.batch, geometry.queries, geometry.heads, geometry.channels},
      "[B, Q, M, D]", value);
  if (key) check_like("key", *key, value.sizes(), "[B, S, M, D]", value);
  return geometry;
}

void check_output(
    const char* name, const at::Tensor& tensor, const Geometry& geometry, const at::Tensor& value) {
  check_like(
      name, tensor, {geometry.batch, geometry.queries, geometry.heads * geometry.channels},
      "[B, Q, M * D]", value);
}

at::ScalarType compute_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

double logit_scale(const Geometry& geometry) { return 1.0 / std::sqrt(double(geometry.channels)); }

at::Tensor pad_channels(const at::Tensor& tensor, int64_t multiple) {
  const int64_t channels = tensor.size(-1);
  const int64_t missing = round_up(channels, multiple) - channels;
  return (missing == 0 ? tensor : at::constant_pad_nd(tensor, {0, missing})).contiguous();
}

}  // namespace lite_detr
