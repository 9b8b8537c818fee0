// Key-aware deformable attention: the weights are a softmax over query times sampled keys.
//
// Forward is one pass over the points, with a softmax relative to the largest logit so far.
// Backward computes the weights from the logsumexp that forward leaves.
#pragma once

#include "scatter.cuh"
#include "weights.cuh"

namespace lite_detr::cuda {

// kShared: the values are the keys, and are read once.
template <typename T, typename Points, int kHeadWidth, bool kShared>
__global__ void __launch_bounds__(kForwardThreads, kResidentThreads<T> / kForwardThreads)
    key_aware_forward(const __grid_constant__ KeyAwareForward<T, Points> arguments) {
  using A = compute_t<T>;
  constexpr Layout kLayout = kKeyAwareForward<T, kHeadWidth, kShared>;
  constexpr int kWidth = kLayout.width, kLanes = kLayout.lanes, kVectors = kLayout.vectors;
  // Lambdas cannot use the layout's members.
  constexpr int kBatch = kLayout.batch, kCorners = kLayout.corners;
  using Part = Channels<A, kWidth>;
  // Whether sampled keys stay in registers until they are added up as values.
  constexpr bool kKept = kShared && kVectors == 1;

  const KernelGeometry& geometry = arguments.geometry;
  const Group<kLayout.lanes, kLayout.threads> group(geometry);
  const TokenReader<T, kWidth, kLanes> values(arguments.value, group.lane);
  const TokenReader<T, kWidth, kLanes> keys(
      kShared ? arguments.value : arguments.key, group.lane);
  const QueryRow<T, kWidth, kLanes, kVectors> query(arguments.query, group.item, group.lane);
  const int32_t points = geometry.levels * geometry.points;
  Part sums[kVectors] = {};
  A maximum = kLowest<A>, total = 0;

  GroupSamples<A, kLanes, kLayout.threads> found(group.lane);
  // Separate keys may have another stride than the values.
  const int32_t step = kShared ? values.step() : 1;

  for (int32_t first = 0; first < points; first += kLanes) {
    const PointRange range(pin(group.item), points);
    const Sample<A> own =
        find_sample(geometry, arguments.points, range, first + group.lane, step, [](int32_t) {
          return A(1);
        });
    const int count = min(kLanes, points - first);
    const auto attend = [&](auto all_exist) {
#pragma unroll 1
      for (int start = 0; start < count; start += kBatch) {
        A logits[kBatch] = {};
        Part samples[kBatch] = {};
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const Sample<A>& point = found[start + i];
#pragma unroll(kVectors == 1 ? 4 : 1)
          for (int vector = 0; vector < kVectors; ++vector) {
            Part sample{};
#pragma unroll(kKept ? 4 : kCorners)
            for (int corner = 0; corner < 4; ++corner) {
              const int32_t row = point.rows[corner];
              add_scaled(
                  sample, point.shares[corner],
                  kShared ? keys.template row<all_exist()>(row, vector)
                          : keys.template row_of_token<all_exist()>(row, vector));
            }
            logits[i] += dot(query.at(vector), sample);
            if (kKept) samples[i] = sample;
          }
        }

#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          logits[i] = sum_lanes<kLanes>(logits[i]) * arguments.scale;
          // A batch may go beyond the last point.
          if (start + i >= count) logits[i] = kLowest<A>;
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          // Relative to the larger of this logit and the largest so far, one of the two weights is
          // 1.
          const bool rises = logits[i] > maximum;
          const A ratio = exponential(rises ? maximum - logits[i] : logits[i] - maximum);
          const A earlier = rises ? ratio : A(1);
          const A weight = rises ? A(1) : ratio;
          maximum = rises ? logits[i] : maximum;
          total = total * earlier + weight;
#pragma unroll
          for (int vector = 0; vector < kVectors; ++vector) {
            sums[vector] = scale(earlier, sums[vector]);
            if constexpr (kKept) {
              add_scaled(sums[vector], weight, samples[i]);
            } else {
              const Sample<A>& point = found[start + i];
#pragma unroll(kCorners)
              for (int corner = 0; corner < 4; ++corner) {
                const int32_t row = point.rows[corner];
                add_scaled(
                    sums[vector], weight * point.shares[corner],
                    kShared ? values.template row<all_exist()>(row, vector)
                            : values.template row_of_token<all_exist()>(row, vector));
              }
            }
          }
        }
      }
    };
    if (found.put(own)) {
      attend(std::true_type());
    } else {
      attend(std::false_type());
    }
  }

  const A share_of_each = A(1) / total;
#pragma unroll
  for (int vector = 0; vector < kVectors; ++vector) {
    sums[vector] = scale(share_of_each, sums[vector]);
  }
  if (group.exists) {
    store_row<kLanes>(arguments.output, group.item, group.lane, sums);
    if (group.lane == 0) {
      store_number(arguments.logsumexp + group.item, maximum + logarithm(total));
    }
  }
}

template <typename T, typename Points, int kHeadWidth, bool kShared>
__global__ void __launch_bounds__(kBackwardThreads, kResidentThreads<T> / kBackwardThreads)
    key_aware_backward(const __grid_constant__ KeyAwareBackward<T, Points> arguments) {
  using A = compute_t<T>;
  constexpr Layout kLayout = kKeyAwareBackward<T, kHeadWidth, kShared>;
  constexpr int kWidth = kLayout.width, kLanes = kLayout.lanes, kVectors = kLayout.vectors;
  using Part = Channels<A, kWidth>;
  using Row = QueryRow<T, kWidth, kLanes, kVectors>;
  // Whether a sampled key stays in registers until its gradient is known, or is sampled again.
  constexpr bool kKept = kVectors == 1;

  const KernelGeometry& geometry = arguments.geometry;
  const Group<kLayout.lanes, kLayout.threads> group(geometry);
  const TokenReader<T, kWidth, kLanes> values(arguments.value, group.lane);
  const TokenReader<T, kWidth, kLanes> keys(
      kShared ? arguments.value : arguments.key, group.lane);
  const int32_t points = geometry.levels * geometry.points;
  const A logsumexp = load_number(arguments.logsumexp + pin(group.item));
  const A mean = row_product(
      Row(arguments.grad_output, group.item, group.lane), arguments.output, group.item,
      group.lane);

  Part grad_query[kVectors] = {};
  for (int32_t first = 0; first < points; first += kLanes) {
    const int32_t item = pin(group.item);
    const PointRange range(item, points);
    const Point<A> own = find_point(geometry, arguments.points, range, first + group.lane);
    const int count = min(kLanes, points - first);
    const Row query(arguments.query, item, group.lane);
    const Row grads(arguments.grad_output, item, group.lane);
    // With separate keys, there are registers for one of the two rows.
    const QueryAddend<T, kWidth, kLanes, kVectors, kShared> added_query(
        query, arguments.query, item, group.lane);
    const QueryAddend<T, kWidth, kLanes, kVectors, true> added_grads(
        grads, arguments.grad_output, item, group.lane);
    const TokenAdder<A, kWidth, kLanes> grad_values(arguments.grad_value, group.lane);
    const TokenAdder<A, kWidth, kLanes> grad_keys(
        kShared ? arguments.grad_value : arguments.grad_key, group.lane);
#pragma unroll 1
    for (int index = 0; index < count; ++index) {
      const Point<A> point = share<kLanes>(own, index);
      const int32_t width = geometry.width[point.level()];
      Mix<A> by_grads, by_query;
      Part key_sample{};
#pragma unroll(kVectors == 1 ? 4 : 1)
      for (int vector = 0; vector < kVectors; ++vector) {
        const Part grad = grads.at(vector), asked = query.at(vector);
#pragma unroll(kLayout.corners)
        for (int corner = 0; corner < 4; ++corner) {
          const Influence<A> influence(point, corner);
          const Part value = values.at(point, corner, width, vector);
          const Part key = kShared ? value : keys.at(point, corner, width, vector);
          by_grads.add(influence, dot(grad, value));
          by_query.add(influence, dot(asked, key));
          if (kKept) add_scaled(key_sample, influence.share, key);
        }
      }
      sum_lanes<kLanes>(by_grads.value, by_query.value, group.lane);
      const A weight = exponential(by_query.value * arguments.scale - logsumexp);
      const A grad_logit = weight * (by_grads.value - mean) * arguments.scale;
      A by_x = weight * by_grads.along_x + grad_logit * by_query.along_x;
      A by_y = weight * by_grads.along_y + grad_logit * by_query.along_y;
      sum_lanes<kLanes>(by_x, by_y, group.lane);
      if (group.exists && group.lane == 0) {
        // The range again, whose registers the loop does not have.
        const PointRange stored(pin(group.item), points);
        store_grad_point(
            geometry, arguments.points, stored, first + index, point.level(), by_x, by_y);
      }
#pragma unroll
      for (int vector = 0; vector < kVectors; ++vector) {
        if (!kKept) {
          key_sample = {};
#pragma unroll(kLayout.corners)
          for (int corner = 0; corner < 4; ++corner) {
            const A share_of_corner = Influence<A>(point, corner).share;
            add_scaled(key_sample, share_of_corner, keys.at(point, corner, width, vector));
          }
        }
        add_scaled(grad_query[vector], grad_logit, key_sample);
        const Part asked = added_query.at(vector);
        Part grad_value = scale(weight, added_grads.at(vector));
        if (kShared) add_scaled(grad_value, grad_logit, asked);
#pragma unroll(kLayout.corners)
        for (int corner = 0; corner < 4; ++corner) {
          if (!point.has(corner) || !group.exists) continue;
          const A share_of_corner = Influence<A>(point, corner).share;
          grad_values.add(point, corner, width, vector, share_of_corner, grad_value);
          if (!kShared) {
            grad_keys.add(point, corner, width, vector, share_of_corner * grad_logit, asked);
          }
        }
      }
    }
  }
  if (group.exists) store_row<kLanes>(arguments.grad_query, group.item, group.lane, grad_query);
}

}  // namespace lite_detr::cuda
