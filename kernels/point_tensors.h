// The tensors that say where points lie, as kernels take them. `LayOut` makes a tensor contiguous.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "geometry.h"
#include "points.h"
#include "storage.h"

namespace lite_detr {

class LocationTensors {
 public:
  template <typename LayOut>
  LocationTensors(const at::Tensor& sampling_locations, const at::Tensor& value, LayOut lay_out)
      : dtype_(sampling_locations.scalar_type()),
        locations_(lay_out(sampling_locations.to(compute_dtype(value.scalar_type())))) {}

  void make_gradient() { gradient_ = at::empty(locations_.sizes(), locations_.options()); }
  at::Tensor gradient() const { return gradient_.to(dtype_); }

  template <typename T>
  Locations<T> for_kernel() const {
    using A = compute_t<T>;
    return {data<A>(locations_), gradient_.defined() ? data<A>(gradient_) : nullptr};
  }

 private:
  at::ScalarType dtype_;
  at::Tensor locations_, gradient_;
};

class OffsetTensors {
 public:
  template <typename LayOut>
  OffsetTensors(
      const at::Tensor& reference_points, const at::Tensor& sampling_offsets,
      const Geometry& geometry, LayOut lay_out)
      : step_(box_step(geometry)),
        references_(lay_out(
            reference_points.to(compute_dtype(sampling_offsets.scalar_type())))),
        offsets_(lay_out(sampling_offsets)) {}

  // `of_positions`: kernels write only the gradient of positions.
  void make_gradient(bool with_references, bool of_positions) {
    if (!of_positions) gradient_ = at::empty(offsets_.sizes(), offsets_.options());
    if (with_references || of_positions) {
      grad_positions_ = at::empty(offsets_.sizes(), references_.options());
    }
    with_references_ = with_references;
  }
  at::Tensor gradient(const Geometry& geometry) const {
    if (gradient_.defined()) return gradient_;
    return grad_offsets(grad_positions_, references_, geometry, offsets_.scalar_type());
  }
  // Empty unless it was asked for.
  at::Tensor reference_gradient(const at::Tensor& reference_points, const Geometry& geometry) const {
    if (!with_references_) return at::empty({0}, reference_points.options());
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
  at::Tensor references_, offsets_, gradient_, grad_positions_;
};

}  // namespace lite_detr
