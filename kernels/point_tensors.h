// The tensors that say where points lie, as kernels take them. `LayOut` makes a tensor contiguous.
#pragma once

#include "geometry.h"
#include "points.h"
#include "storage.h"

namespace lite_detr {

class LocationTensors {
 public:
  template <typename LayOut>
  LocationTensors(const Tensor& sampling_locations, const Tensor& value, LayOut lay_out)
      : dtype_(sampling_locations.scalar_type()),
        locations_(lay_out(api::to(sampling_locations, compute_dtype(value.scalar_type())))) {}

  void make_gradient() { gradient_ = api::empty_like(locations_); }
  Tensor gradient() const { return api::to(gradient_, dtype_); }

  template <typename T>
  Locations<T> for_kernel() const {
    using A = compute_t<T>;
    return {data<A>(locations_), gradient_.defined() ? data<A>(gradient_) : nullptr};
  }

 private:
  ScalarType dtype_;
  Tensor locations_, gradient_;
};

class OffsetTensors {
 public:
  template <typename LayOut>
  OffsetTensors(
      const Tensor& reference_points, const Tensor& sampling_offsets,
      const Geometry& geometry, LayOut lay_out)
      : step_(box_step(geometry)),
        references_(lay_out(
            api::to(reference_points, compute_dtype(sampling_offsets.scalar_type())))),
        offsets_(lay_out(sampling_offsets)) {}

  // `of_positions`: kernels write only the gradient of positions.
  void make_gradient(bool with_references, bool of_positions) {
    if (!of_positions) gradient_ = api::empty_like(offsets_);
    if (with_references || of_positions) {
      grad_positions_ = api::empty(offsets_.sizes(), references_, references_.scalar_type());
    }
    with_references_ = with_references;
  }
  Tensor gradient(const Geometry& geometry) const {
    if (gradient_.defined()) return gradient_;
    return grad_offsets(grad_positions_, references_, geometry, offsets_.scalar_type());
  }
  // Empty unless it was asked for.
  Tensor reference_gradient(const Tensor& reference_points, const Geometry& geometry) const {
    if (!with_references_) return api::empty({0}, reference_points, reference_points.scalar_type());
    return grad_references(grad_positions_, offsets_, geometry, reference_points);
  }

  template <typename T>
  Offsets<T> for_kernel() const {
    using A = compute_t<T>;
    return {
        data<A>(references_), int32_t(references_.size(3)), A(step_), data<T>(offsets_),
        gradient_.defined() ? data<T>(gradient_) : nullptr,
        grad_positions_.defined() ? data<A>(grad_positions_) : nullptr};
  }

 private:
  double step_;
  bool with_references_ = false;
  Tensor references_, offsets_, gradient_, grad_positions_;
};

}  // namespace lite_detr
