// The operators of one device: their signatures, checks and the order of their results.
#pragma once

#include <optional>
#include <tuple>

#include "point_tensors.h"

namespace lite_detr {

// `Device` is a call on a device, of a checked geometry. It has the passes of both attentions for
// points of either kind, `lay_out`, which makes a tensor as kernels take it, and
// `kGivesPositions`, whether its kernels give the gradient of positions instead of offsets.
template <typename Device>
struct Operators {
  static Tensor ms_deform_attn(
      const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
      const Tensor& sampling_locations, const Tensor& attention_weights) {
    const Device device(
        check_msda(value, spatial_shapes, level_start_index, sampling_locations, attention_weights),
        value);
    const LocationTensors points(sampling_locations, value, Device::lay_out);
    return device.forward(value, points, attention_weights);
  }

  static std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
      const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes,
      const Tensor& level_start_index, const Tensor& sampling_locations,
      const Tensor& attention_weights) {
    const Device device(
        check_msda(value, spatial_shapes, level_start_index, sampling_locations, attention_weights),
        value);
    LocationTensors points(sampling_locations, value, Device::lay_out);
    points.make_gradient();
    const auto [grad_value, grad_weights] =
        device.backward(grad_output, value, points, attention_weights, std::nullopt);
    return {grad_value, points.gradient(), grad_weights};
  }

  static Tensor fused_ms_deform_attn(
      const Tensor& value, Sizes sizes, const Tensor& reference_points,
      const Tensor& sampling_offsets, const Tensor& attention_logits) {
    const Geometry geometry =
        check_fused_msda(value, sizes, reference_points, sampling_offsets, attention_logits);
    const Device device(geometry, value);
    const OffsetTensors points(reference_points, sampling_offsets, geometry, Device::lay_out);
    return device.forward(value, points, attention_logits);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> fused_ms_deform_attn_backward(
      const Tensor& grad_output, const Tensor& value, Sizes sizes,
      const Tensor& reference_points, const Tensor& sampling_offsets,
      const Tensor& attention_logits, const Tensor& output, bool with_references) {
    const Geometry geometry =
        check_fused_msda(value, sizes, reference_points, sampling_offsets, attention_logits);
    const Device device(geometry, value);
    OffsetTensors points(reference_points, sampling_offsets, geometry, Device::lay_out);
    points.make_gradient(with_references, Device::kGivesPositions);
    const auto [grad_value, grad_logits] =
        device.backward(grad_output, value, points, attention_logits, output);
    return {
        grad_value, points.reference_gradient(reference_points, geometry),
        points.gradient(geometry), grad_logits};
  }

  static std::tuple<Tensor, Tensor> key_aware_ms_deform_attn(
      const Tensor& query, const std::optional<Tensor>& key, const Tensor& value,
      const Tensor& spatial_shapes, const Tensor& level_start_index,
      const Tensor& sampling_locations) {
    const Device device(
        check_key_aware(query, key, value, spatial_shapes, level_start_index, sampling_locations),
        value);
    const LocationTensors points(sampling_locations, value, Device::lay_out);
    return device.key_aware_forward(query, key, value, points);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> key_aware_ms_deform_attn_backward(
      const Tensor& grad_output, const Tensor& query, const std::optional<Tensor>& key,
      const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
      const Tensor& sampling_locations, const Tensor& output, const Tensor& logsumexp) {
    const Device device(
        check_key_aware(query, key, value, spatial_shapes, level_start_index, sampling_locations),
        value);
    LocationTensors points(sampling_locations, value, Device::lay_out);
    points.make_gradient();
    const auto [grad_query, grad_key, grad_value] =
        device.key_aware_backward(grad_output, query, key, value, points, output, logsumexp);
    return {grad_query, grad_key, grad_value, points.gradient()};
  }

  static std::tuple<Tensor, Tensor> fused_key_aware_ms_deform_attn(
      const Tensor& query, const std::optional<Tensor>& key, const Tensor& value,
      Sizes sizes, const Tensor& reference_points, const Tensor& sampling_offsets) {
    const Geometry geometry =
        check_fused_key_aware(query, key, value, sizes, reference_points, sampling_offsets);
    const Device device(geometry, value);
    const OffsetTensors points(reference_points, sampling_offsets, geometry, Device::lay_out);
    return device.key_aware_forward(query, key, value, points);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
  fused_key_aware_ms_deform_attn_backward(
      const Tensor& grad_output, const Tensor& query, const std::optional<Tensor>& key,
      const Tensor& value, Sizes sizes, const Tensor& reference_points,
      const Tensor& sampling_offsets, const Tensor& output, const Tensor& logsumexp,
      bool with_references) {
    const Geometry geometry =
        check_fused_key_aware(query, key, value, sizes, reference_points, sampling_offsets);
    const Device device(geometry, value);
    OffsetTensors points(reference_points, sampling_offsets, geometry, Device::lay_out);
    points.make_gradient(with_references, Device::kGivesPositions);
    const auto [grad_query, grad_key, grad_value] =
        device.key_aware_backward(grad_output, query, key, value, points, output, logsumexp);
    return {
        grad_query, grad_key, grad_value, points.reference_gradient(reference_points, geometry),
        points.gradient(geometry)};
  }

  template <typename Library>
  static void add_to(Library& library) {
    library.impl("ms_deform_attn", LITE_DETR_KERNEL(ms_deform_attn));
    library.impl("ms_deform_attn_backward", LITE_DETR_KERNEL(ms_deform_attn_backward));
    library.impl("fused_ms_deform_attn", LITE_DETR_KERNEL(fused_ms_deform_attn));
    library.impl("fused_ms_deform_attn_backward", LITE_DETR_KERNEL(fused_ms_deform_attn_backward));
    library.impl("key_aware_ms_deform_attn", LITE_DETR_KERNEL(key_aware_ms_deform_attn));
    library.impl("key_aware_ms_deform_attn_backward", LITE_DETR_KERNEL(key_aware_ms_deform_attn_backward));
    library.impl("fused_key_aware_ms_deform_attn", LITE_DETR_KERNEL(fused_key_aware_ms_deform_attn));
    library.impl("fused_key_aware_ms_deform_attn_backward", LITE_DETR_KERNEL(fused_key_aware_ms_deform_attn_backward));
  }
};

}  // namespace lite_detr
