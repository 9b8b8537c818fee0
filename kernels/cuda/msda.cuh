// Multi-scale deformable attention: the weights of the points are given, or their logits.
#pragma once

#include "scatter.cuh"
#include "weights.cuh"

namespace lite_detr::cuda {

template <typename T, typename Points, int kHeadWidth>
__global__ void __launch_bounds__(kForwardThreads, kResidentThreads<T> / kForwardThreads)
    msda_forward(const __grid_constant__ MsdaForward<T, Points> arguments) {
  using A = compute_t<T>;
  constexpr Layout kLayout = kMsdaForward<T, kHeadWidth>;
  constexpr int kWidth = kLayout.width, kLanes = kLayout.lanes, kVectors = kLayout.vectors;
  // Lambdas cannot use the layout's members.
  constexpr int kBatch = kLayout.batch, kCorners = kLayout.corners;

  const KernelGeometry& geometry = arguments.geometry;
  const Group<kLayout.lanes, kLayout.threads> group(geometry);
  const TokenReader<T, kWidth, kLanes> values(arguments.value, group.lane);
  const int32_t points = geometry.levels * geometry.points;
  const PointRange range(group.item, points);
  const PointWeights<kLanes, T, Points::kLogits> weights(
      arguments.weights + range.first, points, group.lane);
  Channels<A, kWidth> sums[kVectors] = {};

  GroupSamples<A, kLanes, kLayout.threads> samples(group.lane);

  // Each lane finds a point; then all of them add up their channels, point by point.
  for (int32_t first = 0; first < points; first += kLanes) {
    const Sample<A> own = find_sample(
        geometry, arguments.points, range, first + group.lane, values.step(),
        [&](int32_t point) { return weights.at(point); });
    const int count = min(kLanes, points - first);
    const auto add_points = [&](auto all_exist) {
#pragma unroll 1
      for (int start = 0; start < count; start += kBatch) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const Sample<A>& sample = samples[start + i];
#pragma unroll
          for (int vector = 0; vector < kVectors; ++vector) {
#pragma unroll(kCorners)
            for (int corner = 0; corner < 4; ++corner) {
              add_scaled(
                  sums[vector], sample.shares[corner],
                  values.template row<all_exist()>(sample.rows[corner], vector));
            }
          }
        }
      }
    };
    if (samples.put(own)) {
      add_points(std::true_type());
    } else {
      add_points(std::false_type());
    }
  }
  if (group.exists) store_row<kLanes>(arguments.output, group.item, group.lane, sums);
}

template <typename T, typename Points, int kHeadWidth>
__global__ void __launch_bounds__(kBackwardThreads, kResidentThreads<T> / kBackwardThreads)
    msda_backward(const __grid_constant__ MsdaBackward<T, Points> arguments) {
  using A = compute_t<T>;
  constexpr Layout kLayout = kMsdaBackward<T, kHeadWidth>;
  constexpr int kWidth = kLayout.width, kLanes = kLayout.lanes, kVectors = kLayout.vectors;
  constexpr int kBatch = kLayout.batch;
  using Part = Channels<A, kWidth>;

  const KernelGeometry& geometry = arguments.geometry;
  const Group<kLayout.lanes, kLayout.threads> group(geometry);
  const TokenReader<T, kWidth, kLanes> values(arguments.value, group.lane);
  const TokenAdder<A, kWidth, kLanes> grad_values(arguments.grad_value, group.lane);
  const QueryRow<T, kWidth, kLanes, kVectors> grads(
      arguments.grad_output, group.item, group.lane);
  const QueryAddend<T, kWidth, kLanes, kVectors, true> added_grads(
      grads, arguments.grad_output, group.item, group.lane);
  const int32_t points = geometry.levels * geometry.points;
  const PointWeights<kLanes, T, Points::kLogits> weights(
      arguments.weights + int64_t(group.item) * points, points, group.lane);
  A mean = 0;
  if constexpr (Points::kLogits) {
    mean = row_product(grads, arguments.output, pin(group.item), group.lane);
  }

  for (int32_t first = 0; first < points; first += kLanes) {
    const PointRange range(pin(group.item), points);
    const int32_t own_point = first + group.lane;
    const Point<A> own = find_point(geometry, arguments.points, range, own_point);
    const A own_weight = own_point < points ? weights.at(own_point) : A(0);
    A grad_weight = 0, grad_x = 0, grad_y = 0;
    const int count = min(kLanes, points - first);
#pragma unroll 1
    for (int start = 0; start < count; start += kBatch) {
      A by_weight[kBatch], by_x[kBatch], by_y[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const Point<A> point = share<kLanes>(own, start + i);
        const A weight = share<kLanes>(own_weight, start + i);
        const int32_t width = geometry.width[point.level()];
        Mix<A> by_grads;
#pragma unroll(kVectors == 1 ? 4 : 1)
        for (int vector = 0; vector < kVectors; ++vector) {
          const Part grad = grads.at(vector), added = added_grads.at(vector);
#pragma unroll(kLayout.corners)
          for (int corner = 0; corner < 4; ++corner) {
            const Influence<A> influence(point, corner);
            const Part value = values.at(point, corner, width, vector);
            by_grads.add(influence, dot(grad, value));
            if (point.has(corner) && group.exists) {
              grad_values.add(point, corner, width, vector, weight * influence.share, added);
            }
          }
        }
        by_weight[i] = by_grads.value;
        by_x[i] = by_grads.along_x;
        by_y[i] = by_grads.along_y;
      }
      const A total_by_weight = sum_lanes_separately<kLanes>(by_weight, group.lane);
      const A total_by_x = sum_lanes_separately<kLanes>(by_x, group.lane);
      const A total_by_y = sum_lanes_separately<kLanes>(by_y, group.lane);
      if (group.lane / kBatch == start / kBatch) {
        grad_weight = total_by_weight;
        grad_x = total_by_x;
        grad_y = total_by_y;
      }
    }
    if (group.exists && own_point < points) {
      if constexpr (Points::kLogits) grad_weight = own_weight * (grad_weight - mean);
      const PointRange stored(pin(group.item), points);
      store_number(arguments.grad_weights + stored.first + own_point, grad_weight);
      store_grad_point(
          geometry, arguments.points, stored, own_point, own.level(), own_weight * grad_x,
          own_weight * grad_y);
    }
  }
}

}  // namespace lite_detr::cuda
