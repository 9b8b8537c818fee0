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

// The weights of a query's points: given, as they are read, or a softmax.
template <typename T, typename Points>
class Attention {
 public:
  using A = compute_t<T>;

  LITE_DETR_INLINE Attention(const T* weights, const KernelGeometry& geometry, A* scratch)
      : given_(weights), computed_(scratch) {
    if constexpr (Points::kLogits) softmax(weights, geometry.points, scratch);
  }

  // The weights of a group of points, in `target` or elsewhere.
  LITE_DETR_INLINE const A* group(int64_t first, int count, A* target) const {
    if constexpr (Points::kLogits) return computed_ + first;
    load_group(given_ + first, count, target);
    return target;
  }

 private:
  const T* given_;
  const A* computed_;
};

template <typename T, typename Points, int kChannels>
void msda_forward(
    const KernelGeometry& geometry, const Task<T>& task, const MsdaForward<T, Points>& tensors) {
  using A = compute_t<T>;
  using B = Block<A, kChannels>;
  // Sums that do not wait for each other, as registers allow.
  constexpr int kSums = LITE_DETR_VECTOR_BYTES / 16;
  const int64_t channels = geometry.channels;
  const Scratch<T> scratch(task, channels);

  for (int64_t query = task.begin; query < task.end; ++query) {
    const Item item(geometry, task, query);
    const int64_t later = item.index + kPrefetched * geometry.heads;
    prefetch_points(tensors.points, geometry, later);
    prefetch<false>(tensors.weights, geometry.points, later);
    prefetch<true>(tensors.output, channels, later);
    const Attention<T, Points> attention(
        tensors.weights + item.index * geometry.points, geometry, scratch.weights);

    for (int64_t channel = 0; channel < channels; channel += kChannels) {
      B sums[kSums] = {};
      for (int64_t first = 0; first < geometry.points; first += kGroup) {
        const Group<A> group(tensors.points, geometry, item, first);
        alignas(64) A given[kGroup], weights[4][kGroup];
        group.corner_weights(attention.group(first, group.count, given), weights);
        CornerRows<const T> rows;
        rows.find(task.value, scratch.zeros, group);
        for (int point = 0; point < group.count; ++point) {
          for (int corner = 0; corner < 4; ++corner) {
            add_scaled(
                sums[corner % kSums], weights[corner][point],
                load_block<B>(rows.at(corner, point) + channel));
          }
        }
      }
      for (int i = 1; i < kSums; ++i) add_scaled(sums[0], A(1), sums[i]);
      store_block(tensors.output + item.index * channels + channel, sums[0]);
    }
  }
}

template <typename T, typename Points, int kChannels>
void msda_backward(
    const KernelGeometry& geometry, const Task<T>& task, const MsdaBackward<T, Points>& tensors) {
  using A = compute_t<T>;
  using B = Block<A, kChannels>;
  const int64_t channels = geometry.channels;
  const Scratch<T> scratch(task, channels);

  for (int64_t query = task.begin; query < task.end; ++query) {
    const Item item(geometry, task, query);
    const T* grad_output = tensors.grad_output + item.index * channels;
    const Attention<T, Points> attention(
        tensors.weights + item.index * geometry.points, geometry, scratch.weights);
    // The softmax's Jacobian subtracts the mean of the weights' gradients.
    const A mean = Points::kLogits
        ? dot<A, B>(grad_output, tensors.output + item.index * channels, channels) : A(0);

    for (int64_t first = 0; first < geometry.points; first += kGroup) {
      const Group<A> group(tensors.points, geometry, item, first);
      alignas(64) A given[kGroup], weights[4][kGroup];
      const A* factors = attention.group(first, group.count, given);
      group.corner_weights(factors, weights);
      CornerRows<const T> rows;
      rows.find(task.value, scratch.zeros, group);
      CornerRows<A> grad_rows;
      grad_rows.find(task.grad_value, scratch.discarded, group);

      Vec<A> by_weight[kGroup] = {}, by_x[kGroup] = {}, by_y[kGroup] = {};
      for (int64_t channel = 0; channel < channels; channel += kChannels) {
        const B gradient = load_block<B>(grad_output + channel);
        for (int point = 0; point < group.count; ++point) {
          const Slopes<B> slopes = sample_slopes<B>(rows, channel, group, point);
          add_product(by_weight[point], gradient, slopes.sample);
          add_product(by_x[point], gradient, slopes.along_x);
          add_product(by_y[point], gradient, slopes.along_y);
          scatter_block(grad_rows, channel, weights, point, gradient);
        }
      }
      A grad_weights[kGroup], grad_x[kGroup], grad_y[kGroup];
      sum_lanes<A>(by_weight, grad_weights);
      sum_lanes<A>(by_x, grad_x);
      sum_lanes<A>(by_y, grad_y);
      for (int i = 0; i < kGroup; ++i) {
        grad_x[i] *= factors[i];
        grad_y[i] *= factors[i];
        if (Points::kLogits) grad_weights[i] = factors[i] * (grad_weights[i] - mean);
      }
      const int64_t target = item.index * geometry.points + first;
      store_group(tensors.grad_weights + target, group.count, grad_weights);
      store_grad_points(tensors.points, group, geometry, item, first, grad_x, grad_y);
    }
  }
}

}  // namespace lite_detr::cpu::LITE_DETR_ISA
