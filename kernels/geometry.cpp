#include "geometry.h"

#include <cmath>
#include <limits>

namespace lite_detr {

void check_like(
    const char* name, const Tensor& tensor, Sizes shape, const char* layout,
    const Tensor& like) {
  LITE_DETR_CHECK_VALUE(
      tensor.sizes() == shape, name, " must be ", layout, " = ", shape, ", got ", tensor.sizes());
  LITE_DETR_CHECK_TYPE(
      tensor.scalar_type() == like.scalar_type(), name, " must have the value's dtype ",
      like.scalar_type(), ", got ", tensor.scalar_type());
  LITE_DETR_CHECK_VALUE(
      tensor.device() == like.device(), name, " must be on the value's device ", like.device(),
      ", got ", tensor.device());
}

namespace {

// Checks the heights and widths of the levels, in turn, and where they start if that is given.
std::vector<Level> check_levels(Sizes sizes, const int64_t* starts, int64_t tokens) {
  LITE_DETR_CHECK_VALUE(
      tokens <= std::numeric_limits<int32_t>::max(),
      "the value has S = ", tokens, " tokens; at most 2147483647 can be numbered");
  std::vector<Level> levels;
  int64_t end = 0;
  for (size_t level = 0; level < sizes.size() / 2; ++level) {
    const int64_t height = sizes[2 * level], width = sizes[2 * level + 1];
    LITE_DETR_CHECK_VALUE(
        height > 0 && width > 0, "every level needs a positive height and width, got ", height,
        " x ", width, " for level ", level);
    LITE_DETR_CHECK_VALUE(
        starts == nullptr || starts[level] == end, "level_start_index[", level, "] must be ", end,
        ", where the levels before it end, got ", starts[level]);
    // By division, as the product of the given numbers may overflow.
    LITE_DETR_CHECK_VALUE(
        height <= (tokens - end) / width, "level ", level, " of ", height, " x ", width,
        " that starts at token ", end, " reaches past the value's S = ", tokens, " tokens");
    levels.push_back({int32_t(height), int32_t(width), int32_t(end)});
    end += height * width;
  }
  LITE_DETR_CHECK_VALUE(
      end == tokens, "the levels have ", end, " tokens in all, but the value has S = ", tokens);
  return levels;
}

std::vector<Level> check_levels(
    const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& value) {
  // A CPU's value with levels on another device would reach that device's kernels.
  for (const Tensor& levels : {spatial_shapes, level_start_index}) {
    LITE_DETR_CHECK_VALUE(
        levels.is_cpu() || levels.device() == value.device(),
        "spatial_shapes and level_start_index must be on the CPU or on the value's device ",
        value.device(), ", got ", levels.device());
  }
  LITE_DETR_CHECK_VALUE(
      spatial_shapes.dim() == 2 && spatial_shapes.size(1) == 2 && spatial_shapes.size(0) > 0,
      "spatial_shapes must be [L, 2] with L >= 1, got ", spatial_shapes.sizes());
  const int64_t count = spatial_shapes.size(0);
  LITE_DETR_CHECK_VALUE(
      level_start_index.dim() == 1 && level_start_index.size(0) == count,
      "level_start_index must be [L] = [", count, "], got ", level_start_index.sizes());
  LITE_DETR_CHECK_TYPE(
      spatial_shapes.scalar_type() == ScalarType::Long, "spatial_shapes must be torch.int64, got ",
      spatial_shapes.scalar_type());
  LITE_DETR_CHECK_TYPE(
      level_start_index.scalar_type() == ScalarType::Long, "level_start_index must be torch.int64, got ",
      level_start_index.scalar_type());
  // Tensors on a device are copied to the host.
  const Tensor shapes = api::contiguous(api::to_cpu(spatial_shapes));
  const Tensor starts = api::contiguous(api::to_cpu(level_start_index));
  return check_levels(
      Sizes(shapes.const_data_ptr<int64_t>(), 2 * count),
      starts.const_data_ptr<int64_t>(), value.size(1));
}

Geometry check_value(const Tensor& value) {
  LITE_DETR_CHECK_VALUE(
      value.dim() == 4 && value.size(3) > 0, "value must be [B, S, M, D] with D >= 1, got shape ",
      value.sizes());
  const ScalarType dtype = value.scalar_type();
  LITE_DETR_CHECK_TYPE(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
      "value must be float32, float64, float16 or bfloat16, got ", dtype);
  Geometry geometry;
  geometry.batch = value.size(0);
  geometry.tokens = value.size(1);
  geometry.heads = value.size(2);
  geometry.channels = value.size(3);
  return geometry;
}

// Checks a tensor that may be float32 whatever the value is.
void check_exact(const char* name, const Tensor& tensor, const Tensor& value) {
  LITE_DETR_CHECK_TYPE(
      tensor.scalar_type() == value.scalar_type() || tensor.scalar_type() == ScalarType::Float, name,
      " must be ", value.scalar_type(), " (as the value) or Float, got ", tensor.scalar_type());
  LITE_DETR_CHECK_VALUE(
      tensor.device() == value.device(), name, " must be on the value's device ", value.device(),
      ", got ", tensor.device());
}

// Checks locations or offsets, and takes the numbers of queries and points from them.
void check_points(const char* name, const Tensor& points, Geometry& geometry) {
  const Sizes shape = points.sizes();
  LITE_DETR_CHECK_VALUE(
      shape.size() == 6 && shape[0] == geometry.batch && shape[2] == geometry.heads &&
          shape[3] == int64_t(geometry.levels.size()) && shape[5] == 2,
      name, " must be [B, Q, M, L, P, 2] with B = ", geometry.batch, ", M = ", geometry.heads,
      ", L = ", geometry.levels.size(), ", got ", shape);
  LITE_DETR_CHECK_VALUE(
      shape[4] > 0, name, " must hold at least one point a level, got ", shape);
  geometry.queries = shape[1];
  geometry.points = shape[4];
}

// Checks what both attentions take.
Geometry check_sampling(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations) {
  Geometry geometry = check_value(value);
  geometry.levels = check_levels(spatial_shapes, level_start_index, value);
  check_points("sampling_locations", sampling_locations, geometry);
  check_exact("sampling_locations", sampling_locations, value);
  return geometry;
}

Geometry check_fused_sampling(
    const Tensor& value, Sizes sizes, const Tensor& reference_points,
    const Tensor& sampling_offsets) {
  Geometry geometry = check_value(value);
  LITE_DETR_CHECK_VALUE(
      sizes.size() > 0 && sizes.size() % 2 == 0,
      "sizes must be the height and width of one level or more, got ", sizes);
  geometry.levels = check_levels(sizes, nullptr, geometry.tokens);
  check_points("sampling_offsets", sampling_offsets, geometry);
  check_like(
      "sampling_offsets", sampling_offsets, sampling_offsets.sizes(), "[B, Q, M, L, P, 2]", value);
  const Sizes shape = reference_points.sizes();
  LITE_DETR_CHECK_VALUE(
      shape.size() == 4 && shape[0] == geometry.batch && shape[1] == geometry.queries &&
          shape[2] == int64_t(geometry.levels.size()) && (shape[3] == 2 || shape[3] == 4),
      "reference_points must be [B, Q, L, 2] points or [B, Q, L, 4] boxes with B = ",
      geometry.batch, ", Q = ", geometry.queries, ", L = ", geometry.levels.size(), ", got ",
      shape);
  check_exact("reference_points", reference_points, value);
  return geometry;
}

void check_query_and_key(
    const Tensor& query, const std::optional<Tensor>& key, const Tensor& value,
    const Geometry& geometry) {
  check_like(
      "query", query, {geometry.batch, geometry.queries, geometry.heads, geometry.channels},
      "[B, Q, M, D]", value);
  if (key) check_like("key", *key, value.sizes(), "[B, S, M, D]", value);
}

}  // namespace

Geometry check_msda(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights) {
  const Geometry geometry =
      check_sampling(value, spatial_shapes, level_start_index, sampling_locations);
  check_like(
      "attention_weights", attention_weights, sampling_locations.sizes().slice(0, 5),
      "[B, Q, M, L, P]", value);
  return geometry;
}

Geometry check_key_aware(
    const Tensor& query, const std::optional<Tensor>& key, const Tensor& value,
    const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations) {
  const Geometry geometry =
      check_sampling(value, spatial_shapes, level_start_index, sampling_locations);
  check_query_and_key(query, key, value, geometry);
  return geometry;
}

Geometry check_fused_msda(
    const Tensor& value, Sizes sizes, const Tensor& reference_points,
    const Tensor& sampling_offsets, const Tensor& attention_logits) {
  const Geometry geometry =
      check_fused_sampling(value, sizes, reference_points, sampling_offsets);
  check_like(
      "attention_logits", attention_logits, sampling_offsets.sizes().slice(0, 5),
      "[B, Q, M, L, P]", value);
  return geometry;
}

Geometry check_fused_key_aware(
    const Tensor& query, const std::optional<Tensor>& key, const Tensor& value,
    Sizes sizes, const Tensor& reference_points, const Tensor& sampling_offsets) {
  const Geometry geometry =
      check_fused_sampling(value, sizes, reference_points, sampling_offsets);
  check_query_and_key(query, key, value, geometry);
  return geometry;
}

void check_output(
    const char* name, const Tensor& tensor, const Geometry& geometry, const Tensor& value) {
  check_like(
      name, tensor, {geometry.batch, geometry.queries, geometry.heads * geometry.channels},
      "[B, Q, M * D]", value);
}

void check_logsumexp(
    const Tensor& logsumexp, const Geometry& geometry, const Tensor& value) {
  LITE_DETR_CHECK_VALUE(
      logsumexp.sizes() == Sizes({geometry.batch, geometry.queries, geometry.heads}),
      "logsumexp must be [B, Q, M] = ", geometry.batch, ", ", geometry.queries, ", ",
      geometry.heads, ", got ", logsumexp.sizes());
  const ScalarType dtype = compute_dtype(value.scalar_type());
  LITE_DETR_CHECK_TYPE(
      logsumexp.scalar_type() == dtype, "logsumexp must be ", dtype, ", got ",
      logsumexp.scalar_type());
  LITE_DETR_CHECK_VALUE(
      logsumexp.device() == value.device(), "logsumexp must be on the value's device ",
      value.device(), ", got ", logsumexp.device());
}

ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

double box_step(const Geometry& geometry) { return 0.5 / double(geometry.points); }

// The widths and heights of the levels, [L, 2].
static Tensor find_extents(const Geometry& geometry, const Tensor& like) {
  std::vector<double> extents;
  for (const Level& level : geometry.levels) {
    extents.push_back(level.width);
    extents.push_back(level.height);
  }
  return api::view(api::fill(extents, like), {int64_t(geometry.levels.size()), 2});
}

Tensor grad_references(
    const Tensor& grad_positions, const Tensor& sampling_offsets, const Geometry& geometry,
    const Tensor& reference_points) {
  const Tensor extents = find_extents(geometry, grad_positions);
  Tensor gradient = api::multiply(api::sum(grad_positions, {2, 4}), extents);
  if (reference_points.size(3) == 4) {
    const Tensor products = api::multiply(grad_positions, sampling_offsets);
    const Tensor by_extent = api::multiply(api::sum(products, {2, 4}), extents);
    gradient = api::join(gradient, api::scale(by_extent, box_step(geometry)), 3);
  }
  return api::to(gradient, reference_points.scalar_type());
}

Tensor grad_offsets(
    const Tensor& grad_positions, const Tensor& reference_points, const Geometry& geometry,
    ScalarType dtype) {
  // Around a point the unit of an offset is a cell.
  if (reference_points.size(3) == 2) return api::to(grad_positions, dtype);
  const Tensor units = api::multiply(
      api::narrow(reference_points, 3, 2, 2),
      api::scale(find_extents(geometry, grad_positions), box_step(geometry)));
  const Tensor unsqueezed = api::unsqueeze(api::unsqueeze(units, 2), 4);
  return api::to(api::multiply(grad_positions, unsqueezed), dtype);
}

double logit_scale(const Geometry& geometry) { return 1.0 / std::sqrt(double(geometry.channels)); }

Tensor pad_channels(const Tensor& tensor, int64_t multiple) {
  const int64_t channels = tensor.size(-1);
  const int64_t missing = round_up(channels, multiple) - channels;
  return api::contiguous(missing == 0 ? tensor : api::pad(tensor, missing));
}

}  // namespace lite_detr
