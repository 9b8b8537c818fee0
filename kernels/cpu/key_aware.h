// Key-aware deformable attention: the weights are a softmax over query times sampled keys.
//
// The samples of one group of points are held at a time; the softmax goes on from group to group,
// relative to the largest logit so far. The backward pass samples again, and computes the weights
// from the saved logsumexp.
#pragma once

#include "msda.h"

namespace lite_detr::cpu::LITE_DETR_ISA {

template <typename T, typename Points, int kChannels>
void key_aware_forward(
    const KernelGeometry& geometry, const Task<T>& task,
    const KeyAwareForward<T, Points>& tensors) {
  using A = compute_t<T>;
  using B = Block<A, kChannels>;
  const int64_t channels = geometry.channels;
  const Scratch<T> scratch(task, channels);
  const Ones<A> ones;
  const bool shared = task.key.first == nullptr;
  A* samples = scratch.first;

  for (int64_t query = task.begin; query < task.end; ++query) {
    const Item item(geometry, task, query);
    const T* query_row = tensors.query + item.index * channels;
    T* output = tensors.output + item.index * channels;
    A* sums = scratch.second;  // of the weighted samples, one row
    A maximum = kLowest<A>, total = 0;
    const int64_t later = item.index + kPrefetched * geometry.heads;
    prefetch_points(tensors.points, geometry, later);
    prefetch<false>(tensors.query, channels, later);
    prefetch<true>(tensors.output, channels, later);

    for (int64_t first = 0; first < geometry.points; first += kGroup) {
      const Group<A> group(tensors.points, geometry, item, first);
      alignas(64) A weights[4][kGroup];
      group.corner_weights(ones.factors, weights);
      CornerRows<const T> rows;
      rows.find(task.value, scratch.zeros, group);
      CornerRows<const T> key_rows;
      if (!shared) key_rows.find(task.key, scratch.zeros, group);

      Vec<A> products[kGroup] = {};
      for (int64_t channel = 0; channel < channels; channel += kChannels) {
        const B query_block = load_block<B>(query_row + channel);
        for (int point = 0; point < group.count; ++point) {
          const B sample = sample_block<B>(rows, channel, weights, point);
          store_block(samples + point * channels + channel, sample);
          if (shared) {
            add_product(products[point], query_block, sample);
          } else {
            add_product(
                products[point], query_block, sample_block<B>(key_rows, channel, weights, point));
          }
        }
      }
      alignas(64) A logits[kGroup], attention[kGroup];
      sum_lanes<A>(products, logits);
      for (int i = 0; i < kGroup; ++i) {
        logits[i] = i < group.count ? logits[i] * tensors.scale : kLowest<A>;
      }
      Vec<A> largest = load(logits);
      for (int i = kLanes<A>; i < kGroup; i += kLanes<A>) {
        const Vec<A> others = load(logits + i);
        largest = largest > others ? largest : others;
      }
      const A group_maximum = max_lanes<A>(largest);
      const A new_maximum = group_maximum > maximum ? group_maximum : maximum;
      Vec<A> partial_total = {};
      for (int i = 0; i < kGroup; i += kLanes<A>) {
        const Vec<A> powers = exponential(load(logits + i) - new_maximum);
        partial_total += powers;
        store(attention + i, powers);
      }
      const A earlier = first == 0 ? A(0) : exponential(maximum - new_maximum);
      maximum = new_maximum;
      total = total * earlier + sum_lanes<A>(partial_total);

      const bool is_last = first + kGroup >= geometry.points;
      const A share = 1 / total;
      for (int64_t channel = 0; channel < channels; channel += kChannels) {
        B sum = zero_block<B>();
        if (first > 0) add_scaled(sum, earlier, load_block<B>(sums + channel));
        for (int point = 0; point < group.count; ++point) {
          add_scaled(
              sum, attention[point], load_block<B>(samples + point * channels + channel));
        }
        if (is_last) {
          B result = zero_block<B>();
          add_scaled(result, share, sum);
          store_block(output + channel, result);
        } else {
          store_block(sums + channel, sum);
        }
      }
    }
    tensors.logsumexp[item.index] = maximum + logarithm(total);
  }
}

template <typename T, typename Points, int kChannels>
void key_aware_backward(
    const KernelGeometry& geometry, const Task<T>& task,
    const KeyAwareBackward<T, Points>& tensors) {
  using A = compute_t<T>;
  using B = Block<A, kChannels>;
  const int64_t channels = geometry.channels;
  const Scratch<T> scratch(task, channels);
  const Ones<A> ones;
  const bool shared = task.key.first == nullptr;
  A* key_samples = scratch.first;
  A* query_sums = scratch.second;  // one row

  for (int64_t query = task.begin; query < task.end; ++query) {
    const Item item(geometry, task, query);
    const T* query_row = tensors.query + item.index * channels;
    const T* grad_output = tensors.grad_output + item.index * channels;
    // The softmax's Jacobian subtracts the mean of the weights' gradients, which is the product of
    // the output and its gradient.
    const A mean =
        dot<A, B>(grad_output, tensors.output + item.index * channels, channels);
    const A logsumexp = tensors.logsumexp[item.index];

    for (int64_t first = 0; first < geometry.points; first += kGroup) {
      const Group<A> group(tensors.points, geometry, item, first);
      alignas(64) A weights[4][kGroup];
      group.corner_weights(ones.factors, weights);
      CornerRows<const T> rows;
      rows.find(task.value, scratch.zeros, group);
      CornerRows<A> grad_rows, grad_key_rows;
      grad_rows.find(task.grad_value, scratch.discarded, group);
      CornerRows<const T> key_rows;
      if (!shared) {
        key_rows.find(task.key, scratch.zeros, group);
        grad_key_rows.find(task.grad_key, scratch.discarded, group);
      }

      Vec<A> by_logit[kGroup] = {}, by_weight[kGroup] = {};
      for (int64_t channel = 0; channel < channels; channel += kChannels) {
        const B query_block = load_block<B>(query_row + channel);
        const B gradient = load_block<B>(grad_output + channel);
        for (int point = 0; point < group.count; ++point) {
          const B sample = sample_block<B>(rows, channel, weights, point);
          add_product(by_weight[point], gradient, sample);
          B key_sample = sample;
          if (!shared) {
            key_sample = sample_block<B>(key_rows, channel, weights, point);
          }
          add_product(by_logit[point], query_block, key_sample);
          store_block(key_samples + point * channels + channel, key_sample);
        }
      }
      A attention[kGroup], grad_logits[kGroup], logits[kGroup], grad_attention[kGroup];
      sum_lanes<A>(by_logit, logits);
      sum_lanes<A>(by_weight, grad_attention);
      for (int i = 0; i < kGroup; i += kLanes<A>) {
        const Vec<A> weight = exponential(load(logits + i) * tensors.scale - logsumexp);
        store(attention + i, weight);
        store(grad_logits + i, weight * (load(grad_attention + i) - mean) * tensors.scale);
      }

      Vec<A> by_x[kGroup] = {}, by_y[kGroup] = {};
      for (int64_t channel = 0; channel < channels; channel += kChannels) {
        const B query_block = load_block<B>(query_row + channel);
        const B gradient = load_block<B>(grad_output + channel);
        B query_sum = first == 0 ? zero_block<B>() : load_block<B>(query_sums + channel);
        for (int point = 0; point < group.count; ++point) {
          add_scaled(
              query_sum, grad_logits[point],
              load_block<B>(key_samples + point * channels + channel));
          B grad_sample = zero_block<B>(), grad_key_sample = zero_block<B>();
          add_scaled(grad_sample, attention[point], gradient);
          add_scaled(grad_key_sample, grad_logits[point], query_block);
          if (shared) {
            add_scaled(grad_sample, A(1), grad_key_sample);
          }
          const Slopes<B> slopes = sample_slopes<B>(rows, channel, group, point);
          add_product(by_x[point], grad_sample, slopes.along_x);
          add_product(by_y[point], grad_sample, slopes.along_y);
          scatter_block(grad_rows, channel, weights, point, grad_sample);
          if (!shared) {
            const Slopes<B> key_slopes = sample_slopes<B>(key_rows, channel, group, point);
            add_product(by_x[point], grad_key_sample, key_slopes.along_x);
            add_product(by_y[point], grad_key_sample, key_slopes.along_y);
            scatter_block(grad_key_rows, channel, weights, point, grad_key_sample);
          }
        }
        store_block(query_sums + channel, query_sum);
      }
      A grad_x[kGroup], grad_y[kGroup];
      sum_lanes<A>(by_x, grad_x);
      sum_lanes<A>(by_y, grad_y);
      store_grad_points(tensors.points, group, geometry, item, first, grad_x, grad_y);
    }
    for (int64_t channel = 0; channel < channels; channel += kChannels) {
      store_block(
          tensors.grad_query + item.index * channels + channel, load_block<B>(query_sums + channel));
    }
  }
}

}  // namespace lite_detr::cpu::LITE_DETR_ISA
