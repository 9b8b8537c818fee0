// Multi-scale deformable attention: the weights of the points are given, or their logits.
#pragma once

#include "samples.h"

namespace lite_detr::cpu::LITE_DETR_ISA {

// Below every logit, and finite: logits that are all -inf must not compute inf - inf.
template <typename A>
constexpr A kLowest = sizeof(A) == sizeof(double) ? A(-__DBL_MAX__) : A(-__FLT_MAX__);

// The softmax of `count` logits, and zeros up to a whole group.
template <typename T>
LITE_DETR_INLINE void softmax(const T* logits, int64_t count, compute_t<T>* weights) {
  using A = compute_t<T>;
  Vec<A> largest = broadcast(kLowest<A>);
  for (int64_t first = 0; first < count; first += kGroup) {
    const int remaining = count - first < kGroup ? int(count - first) : kGroup;
    load_group(logits + first, remaining, weights + first);
    for (int64_t i = first + remaining; i < first + kGroup; ++i) weights[i] = -__builtin_inf();
    for (int64_t i = first; i < first + kGroup; i += kLanes<A>) {
      const Vec<A> others = load(weights + i);
      largest = largest > others ? largest : others;
    }
  }
  const A maximum = max_lanes<A>(largest);
  const int64_t end = (count + kGroup - 1) / kGroup * kGroup;
  Vec<A> totals = {};
  for (int64_t i = 0; i < end; i += kLanes<A>) {
    const Vec<A> powers = exponential(load(weights + i) - maximum);
    totals += powers;
    store(weights + i, powers);
  }
  const A share = 1 / sum_lanes<A>(totals);
  for (int64_t i = 0; i < end; i += kLanes<A>) store(weights + i, load(weights + i) * share);
}

// Finds the weights of queries' points, if they are a softmax.
template <typename Points, typename T>
LITE_DETR_INLINE void find_weights(
    const T* weights, const KernelGeometry& geometry, compute_t<T>* computed) {
  if constexpr (Points::kLogits) softmax(weights, geometry.points, computed);
}

// The weights of a group of points: as found, or as given, in `target`.
template <typename Points, typename T>
LITE_DETR_INLINE const compute_t<T>* weights_of_group(
    const T* weights, int64_t first, int count, const compute_t<T>* computed,
    compute_t<T>* target) {
  if constexpr (Points::kLogits) return computed + first;
  load_group(weights + first, count, target);
  return target;
}

template <typename T, typename Points, typename Layout, int kChannels>
void msda_forward(
    const KernelGeometry& geometry, const Task<T>& task, const MsdaForward<T, Points>& tensors) {
  using A = compute_t<T>;
  using B = Block<A, kChannels>;
  struct Place {
    alignas(64) A weights[4][kGroup];
    CornerRows<const T, Layout> rows;
  };
  // Sums that do not wait for each other, as registers allow.
  constexpr int kSums = LITE_DETR_VECTOR_BYTES / 16;
  const int64_t channels = Layout::channels(geometry), points = geometry.points;
  const int64_t groups = groups_of_query(geometry);
  const int64_t together = groups_together(geometry) / groups;
  const Scratch<T, Place> scratch(task, geometry);

  for (int64_t begin = task.begin; begin < task.end; begin += together) {
    const int64_t count = task.end - begin < together ? task.end - begin : together;
    for (int64_t i = 0; i < count; ++i) {
      const Item item(geometry, task, begin + i);
      const int64_t later = item.index + kPrefetched * geometry.heads;
      prefetch_points(tensors.points, geometry, later);
      prefetch<false>(tensors.weights, points, later);
      prefetch<true>(tensors.output, channels, later);
      find_weights<Points>(
          tensors.weights + item.index * points, geometry, scratch.weights + i * groups * kGroup);
    }
    for (int64_t i = 0; i < count; ++i) {
      const Item item(geometry, task, begin + i);
      for (int64_t first = 0; first < points; first += kGroup) {
        Place& place = scratch.places[i * groups + first / kGroup];
        Group<A> group;
        group.template find<Layout::kBordered>(tensors.points, geometry, item, first, points);
        alignas(64) A given[kGroup];
        const A* factors = weights_of_group<Points>(
            tensors.weights + item.index * points, first, group.count,
            scratch.weights + i * groups * kGroup, given);
        group.corner_weights(factors, place.weights);
        place.rows.find(task.value, scratch.zeros, group);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const Item item(geometry, task, begin + i);
      for (int64_t channel = 0; channel < channels; channel += kChannels) {
        B sums[kSums] = {};
        for (int64_t first = 0; first < points; first += kGroup) {
          const Place& place = scratch.places[i * groups + first / kGroup];
          const int in_group = count_in_group(first, points);
          for (int point = 0; point < in_group; ++point) {
            for (int corner = 0; corner < 4; ++corner) {
              add_scaled(
                  sums[corner % kSums], place.weights[corner][point],
                  load_block<B>(place.rows.at(corner, point) + channel));
            }
          }
        }
        for (int j = 1; j < kSums; ++j) add_scaled(sums[0], A(1), sums[j]);
        store_block(tensors.output + item.index * channels + channel, sums[0]);
      }
    }
  }
}

template <typename T, typename Points, typename Layout, int kChannels>
void msda_backward(
    const KernelGeometry& geometry, const Task<T>& task, const MsdaBackward<T, Points>& tensors) {
  using A = compute_t<T>;
  using B = Block<A, kChannels>;
  struct Place {
    alignas(64) A weights[4][kGroup];
    alignas(64) A factors[kGroup], right[kGroup], lower[kGroup];
    CornerRows<const T, Layout> rows;
    CornerRows<A, Layout> grad_rows;
  };
  const int64_t channels = Layout::channels(geometry), points = geometry.points;
  const int64_t groups = groups_of_query(geometry);
  const int64_t together = groups_together(geometry) / groups;
  const Scratch<T, Place> scratch(task, geometry);

  for (int64_t begin = task.begin; begin < task.end; begin += together) {
    const int64_t count = task.end - begin < together ? task.end - begin : together;
    A means[kTogether];
    for (int64_t i = 0; i < count; ++i) {
      const Item item(geometry, task, begin + i);
      const int64_t later = item.index + kPrefetched * geometry.heads;
      prefetch_points(tensors.points, geometry, later);
      prefetch<false>(tensors.weights, points, later);
      prefetch<false>(tensors.grad_output, channels, later);
      prefetch_gradients(tensors.points, geometry, later);
      prefetch<true>(tensors.grad_weights, points, later);
      find_weights<Points>(
          tensors.weights + item.index * points, geometry, scratch.weights + i * groups * kGroup);
      means[i] = 0;
      if constexpr (Points::kLogits) {
        // The softmax's Jacobian subtracts the mean of the weights' gradients.
        prefetch<false>(tensors.output, channels, later);
        means[i] = dot<A, B>(
            tensors.grad_output + item.index * channels, tensors.output + item.index * channels,
            channels);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const Item item(geometry, task, begin + i);
      Place* place = scratch.places + i * groups;
      for (int64_t first = task.first_point; first < task.end_point; first += kGroup, ++place) {
        Group<A> group;
        group.template find<Layout::kBordered>(
            tensors.points, geometry, item, first, task.end_point);
        const A* factors = weights_of_group<Points>(
            tensors.weights + item.index * points, first, group.count,
            scratch.weights + i * groups * kGroup, place->factors);
        group.corner_weights(factors, place->weights);
        if (factors != place->factors) std::memcpy(place->factors, factors, sizeof(place->factors));
        std::memcpy(place->right, group.right, sizeof(place->right));
        std::memcpy(place->lower, group.lower, sizeof(place->lower));
        place->rows.find(task.value, nullptr, group);
        place->grad_rows.find(task.grad_value, nullptr, group);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const Item item(geometry, task, begin + i);
      const T* grad_output = tensors.grad_output + item.index * channels;
      const Place* place = scratch.places + i * groups;
      for (int64_t first = task.first_point; first < task.end_point; first += kGroup, ++place) {
        const int in_group = count_in_group(first, task.end_point);
        // The products of the gradient and each corner's row, from which all others follow.
        Vec<A> products[4][kGroup];
        for (Vec<A>* of_points : products) {
          for (int point = in_group; point < kGroup; ++point) of_points[point] = Vec<A>{};
        }
        for (int64_t channel = 0; channel < channels; channel += kChannels) {
          const B gradient = load_block<B>(grad_output + channel);
          for (int point = 0; point < in_group; ++point) {
            for (int corner = 0; corner < 4; ++corner) {
              Vec<A> sum = channel == 0 ? Vec<A>{} : products[corner][point];
              add_product(
                  sum, gradient, load_block<B>(place->rows.at(corner, point) + channel));
              products[corner][point] = sum;
            }
            scatter_block(place->grad_rows, channel, place->weights, point, gradient);
          }
        }
        alignas(64) A corners[4][kGroup], grad_weights[kGroup], grad_x[kGroup], grad_y[kGroup];
        for (int corner = 0; corner < 4; ++corner) sum_lanes<A>(products[corner], corners[corner]);
        for (int j = 0; j < kGroup; j += kLanes<A>) {
          const Vec<A> factor = load(place->factors + j);
          const Vec<A> right = load(place->right + j), lower = load(place->lower + j);
          const Vec<A> a = load(corners[0] + j), c = load(corners[2] + j);
          const Vec<A> top = load(corners[1] + j) - a, bottom = load(corners[3] + j) - c;
          const Vec<A> upper = a + right * top;
          const Vec<A> along_y = (c + right * bottom) - upper;
          const Vec<A> by_weight = upper + lower * along_y;
          store(grad_x + j, factor * (top + lower * (bottom - top)));
          store(grad_y + j, factor * along_y);
          store(grad_weights + j, Points::kLogits ? factor * (by_weight - means[i]) : by_weight);
        }
        store_group(
            tensors.grad_weights + item.index * points + first, in_group, grad_weights);
        store_grad_points(tensors.points, geometry, item, first, in_group, grad_x, grad_y);
      }
    }
  }
}

}  // namespace lite_detr::cpu::LITE_DETR_ISA
