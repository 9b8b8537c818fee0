#include "geometry.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>

namespace lite_detr {

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

namespace {

// Checks the heights and widths of the levels, in turn, and where they start if that is given.
std::vector<Level> check_levels(at::IntArrayRef sizes, const int64_t* starts, int64_t tokens) {
  TORCH_CHECK_VALUE(
      tokens <= std::numeric_limits<int32_t>::max(),
      "the value has S = ", tokens, " tokens; at most 2147483647 can be numbered");
  std::vector<Level> levels;
  int64_t end = 0;
  for (size_t level = 0; level < sizes.size() / 2; ++level) {
    const int64_t height = sizes[2 * level], width = sizes[2 * level + 1];
    TORCH_CHECK_VALUE(
        height > 0 && width > 0, "every level needs a positive height and width, got ", height,
        " x ", width, " for level ", level);
    TORCH_CHECK_VALUE(
        starts == nullptr || starts[level] == end, "level_start_index[", level, "] must be ", end,
        ", where the levels before it end, got ", starts[level]);
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

std::vector<Level> check_levels(
    const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& value) {
  // A CPU's value with levels on another device would reach that device's kernels.
  for (const at::Tensor& levels : {spatial_shapes, level_start_index}) {
    TORCH_CHECK_VALUE(
        levels.is_cpu() || levels.device() == value.device(),
        "spatial_shapes and level_start_index must be on the CPU or on the value's device ",
        value.device(), ", got ", levels.device());
  }
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
  // Tensors on a device are copied to the host.
  const at::Tensor shapes = spatial_shapes.cpu().contiguous();
  const at::Tensor starts = level_start_index.cpu().contiguous();
  return check_levels(
      at::IntArrayRef(shapes.const_data_ptr<int64_t>(), 2 * count),
      starts.const_data_ptr<int64_t>(), value.size(1));
}

Geometry check_value(const at::Tensor& value) {
  TORCH_CHECK_VALUE(
      value.dim() == 4 && value.size(3) > 0, "value must be [B, S, M, D] with D >= 1, got shape ",
      value.sizes());
  const at::ScalarType dtype = value.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
      "value must be float32, float64, float16 or bfloat16, got ", dtype);
  Geometry geometry;
  geometry.batch = value.size(0);
  geometry.tokens = value.size(1);
  geometry.heads = value.size(2);
  geometry.channels = value.size(3);
  return geometry;
}

// Checks a tensor that may be float32 whatever the value is.
void check_exact(const char* name, const at::Tensor& tensor, const at::Tensor& value) {
  TORCH_CHECK_TYPE(
      tensor.scalar_type() == value.scalar_type() || tensor.scalar_type() == at::kFloat, name,
      " must be ", value.scalar_type(), " (as the value) or Float, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(
      tensor.device() == value.device(), name, " must be on the value's device ", value.device(),
      ", got ", tensor.device());
}

// Checks locations or offsets, and takes the numbers of queries and points from them.
void check_points(const char* name, const at::Tensor& points, Geometry& geometry) {
  const at::IntArrayRef shape = points.sizes();
  TORCH_CHECK_VALUE(
      shape.size() == 6 && shape[0] == geometry.batch && shape[2] == geometry.heads &&
          shape[3] == int64_t(geometry.levels.size()) && shape[5] == 2,
      name, " must be [B, Q, M, L, P, 2] with B = ", geometry.batch, ", M = ", geometry.heads,
      ", L = ", geometry.levels.size(), ", got ", shape);
  TORCH_CHECK_VALUE(
      shape[4] > 0, name, " must hold at least one point a level, got ", shape);
  geometry.queries = shape[1];
  geometry.points = shape[4];
}

// Checks what both attentions take.
Geometry check_sampling(
    const at::Tensor& value, const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
    const at::Tensor& sampling_locations) {
  Geometry geometry = check_value(value);
  geometry.levels = check_levels(spatial_shapes, level_start_index, value);
  check_points("sampling_locations", sampling_locations, geometry);
  check_exact("sampling_locations", sampling_locations, value);
  return geometry;
}

Geometry check_fused_sampling(
    const at::Tensor& value, at::IntArrayRef sizes, const at::Tensor& reference_points,
    const at::Tensor& sampling_offsets) {
  Geometry geometry = check_value(value);
  TORCH_CHECK_VALUE(
      sizes.size() > 0 && sizes.size() % 2 == 0,
      "sizes must be the height and width of one level or more, got ", sizes);
  geometry.levels = check_levels(sizes, nullptr, geometry.tokens);
  check_points("sampling_offsets", sampling_offsets, geometry);
  check_like(
      "sampling_offsets", sampling_offsets, sampling_offsets.sizes(), "[B, Q, M, L, P, 2]", value);
  const at::IntArrayRef shape = reference_points.sizes();
  TORCH_CHECK_VALUE(
      shape.size() == 4 && shape[0] == geometry.batch && shape[1] == geometry.queries &&
          shape[2] == int64_t(geometry.levels.size()) && (shape[3] == 2 || shape[3] == 4),
      "reference_points must be [B, Q, L, 2] points or [B, Q, L, 4] boxes with B = ",
      geometry.batch, ", Q = ", geometry.queries, ", L = ", geometry.levels.size(), ", got ",
      shape);
  check_exact("reference_points", reference_points, value);
  return geometry;
}

void check_query_and_key(
    const at::Tensor& query, const std::optional<at::Tensor>& key, const at::Tensor& value,
    const Geometry& geometry) {
  check_like(
      "query", query, {geometry.batch, geometry.queries, geometry.heads, geometry.channels},
      "[B, Q, M, D]", value);
  if (key) check_like("key", *key, value.sizes(), "[B, S, M, D]", value);
}

}  // namespace

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
  check_query_and_key(query, key, value, geometry);
  return geometry;
}

Geometry check_fused_msda(
    const at::Tensor& value, at::IntArrayRef sizes, const at::Tensor& reference_points,
    const at::Tensor& sampling_offsets, const at::Tensor& attention_logits) {
  const Geometry geometry =
      check_fused_sampling(value, sizes, reference_points, sampling_offsets);
  check_like(
      "attention_logits", attention_logits, sampling_offsets.sizes().slice(0, 5),
      "[B, Q, M, L, P]", value);
  return geometry;
}

Geometry check_fused_key_aware(
    const at::Tensor& query, const std::optional<at::Tensor>& key, const at::Tensor& value,
    at::IntArrayRef sizes, const at::Tensor& reference_points, const at::Tensor& sampling_offsets) {
  const Geometry geometry =
      check_fused_sampling(value, sizes, reference_points, sampling_offsets);
  check_query_and_key(query, key, value, geometry);
  return geometry;
}

void check_output(
    const char* name, const at::Tensor& tensor, const Geometry& geometry, const at::Tensor& value) {
  check_like(
      name, tensor, {geometry.batch, geometry.queries, geometry.heads * geometry.channels},
      "[B, Q, M * D]", value);
}

void check_logsumexp(
    const at::Tensor& logsumexp, const Geometry& geometry, const at::Tensor& value) {
  TORCH_CHECK_VALUE(
      logsumexp.sizes() == at::IntArrayRef({geometry.batch, geometry.queries, geometry.heads}),
      "logsumexp must be [B, Q, M] = ", geometry.batch, ", ", geometry.queries, ", ",
      geometry.heads, ", got ", logsumexp.sizes());
  const at::ScalarType dtype = compute_dtype(value.scalar_type());
  TORCH_CHECK_TYPE(
      logsumexp.scalar_type() == dtype, "logsumexp must be ", dtype, ", got ",
      logsumexp.scalar_type());
  TORCH_CHECK_VALUE(
      logsumexp.device() == value.device(), "logsumexp must be on the value's device ",
      value.device(), ", got ", logsumexp.device());
}

at::ScalarType compute_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

double box_step(const Geometry& geometry) { return 0.5 / double(geometry.points); }

// The widths and heights of the levels, [L, 2]. A copy from the host would wait for the device, and
// no CUDA graph could hold it.
static at::Tensor find_extents(const Geometry& geometry, const at::Tensor& like) {
  const int64_t count = geometry.levels.size();
  const at::Tensor extents = at::empty({count, 2}, like.options());
  for (int64_t level = 0; level < count; ++level) {
    extents.select(0, level).select(0, 0).fill_(geometry.levels[level].width);
    extents.select(0, level).select(0, 1).fill_(geometry.levels[level].height);
  }
  return extents;
}

at::Tensor grad_references(
    const at::Tensor& grad_positions, const at::Tensor& sampling_offsets, const Geometry& geometry,
    const at::Tensor& reference_points) {
  const at::Tensor extents = find_extents(geometry, grad_positions);
  at::Tensor gradient = grad_positions.sum({2, 4}) * extents;
  if (reference_points.size(3) == 4) {
    const at::Tensor by_extent = (grad_positions * sampling_offsets).sum({2, 4}) * extents;
    gradient = at::cat({gradient, by_extent * box_step(geometry)}, 3);
  }
  return gradient.to(reference_points.scalar_type());
}

at::Tensor grad_offsets(
    const at::Tensor& grad_positions, const at::Tensor& reference_points, const Geometry& geometry,
    at::ScalarType dtype) {
  // Around a point the unit of an offset is a cell.
  if (reference_points.size(3) == 2) return grad_positions.to(dtype);
  const at::Tensor units = reference_points.narrow(3, 2, 2) *
      (find_extents(geometry, grad_positions) * box_step(geometry));
  return (grad_positions * units.unsqueeze(2).unsqueeze(4)).to(dtype);
}

double logit_scale(const Geometry& geometry) { return 1.0 / std::sqrt(double(geometry.channels)); }

at::Tensor pad_channels(const at::Tensor& tensor, int64_t multiple) {
  const int64_t channels = tensor.size(-1);
  const int64_t missing = round_up(channels, multiple) - channels;
  return (missing == 0 ? tensor : at::constant_pad_nd(tensor, {0, missing})).contiguous();
}

}  // namespace lite_detr
