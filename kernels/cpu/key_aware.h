// Key-aware deformable attention: the weights are a softmax over query times sampled keys.
//
// The samples of one group of points are held at a time; the softmax goes on from group to group,
// relative to the largest logit so far. The backward pass samples again, and computes the weights
// from the saved logsumexp.
#pragma once

#include "samples.h"

namespace lite_detr::cpu::LITE_DETR_ISA {

// Below every logit, and finite: a group whose logits are all -inf must not compute inf - inf.
template <typename A>
constexpr A kLowest = sizeof(A) == sizeof(double) ? A(-__DBL_MAX__) : A(-__FLT_MAX__);

template <typename T, int kChannels>
void key_aware_forward(
    const KernelGeometry& geometry, const Task<T>& task, const KeyAwareForward<T>& tensors) {
  using A = compute_t<T>;
  using B = Block<A, kChannels>;
  const int64_t channels = geometry.channels;
  const Scratch<T> scratch(task, channels);
  const Ones<A> ones;
  A* samples = scratch.first;

  for (int64_t query = task.begin; query < task.end; ++query) {
    const int64_t item =
        (task.image * geometry.queries + query) * geometry.heads + task.head;
    const T* query_row = tensors.query + item * channels;
    T* output = tensors.output + item * channels;
    A* sums = scratch.second;  // of the weighted samples, one row
    A maximum = kLowest<A>, total = 0;

    for (int64_t first = 0; first < geometry.points; first += kGroup) {
      Group<A> group;
      group.locate(tensors.locations + (item * geometry.points + first) * 2, geometry, first);
      alignas(64) A weights[4][kGroup];
      group.corner_weights(ones.factors, weights);

      Vec<A> products[kGroup] = {};
      for (int64_t channel = 0; channel < channels; channel += kChannels) {
        const B query_block = load_block<B>(query_row + channel);
        for (int point = 0; point < group.count; ++point) {
          const CornerRows<const T> rows(task.value, scratch.zeros, group, point);
          const B sample = sample_block<B>(rows, channel, weights, point);
          store_block(samples + point * channels + channel, sample);
          if (task.key.first == nullptr) {
            add_product(products[point], query_block, sample);
          } else {
            const CornerRows<const T> key_rows(task.key, scratch.zeros, group, point);
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
      for (int i = 0; i < kGroup; ++i) attention[i] = exponential(logits[i] - new_maximum);
      Vec<A> partial_total = load(attention);
      for (int i = kLanes<A>; i < kGroup; i += kLanes<A>) partial_total += load(attention + i);
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
    tensors.logsumexp[item] = maximum + logarithm(total);
  }
}

template <typename T, int kChannels>
void key_aware_backward(
    const KernelGeometry& geometry, const Task<T>& task, const KeyAwareBackward<T>& tensors) {
  using A = compute_t<T>;
  using B = Block<A, kChannels>;
  const int64_t channels = geometry.channels;
  const Scratch<T> scratch(task, channels);
  const Ones<A> ones;
  const bool shared = task.key.first == nullptr;
  A* key_samples = scratch.first;
  A* query_sums = scratch.second;  // one row

  for (int64_t query = task.begin; query < task.end; ++query) {
    const int64_t item =
        (task.image * geometry.queries + query) * geometry.heads + task.head;
    const T* query_row = tensors.query + item * channels;
    const T* grad_output = tensors.grad_output + item * channels;
    // The softmax's Jacobian subtracts the mean of the weights' gradients, which is the product of
    // the output and its gradient.
    Vec<A> products = {};
    for (int64_t channel = 0; channel < channels; channel += kChannels) {
      add_product(
          products, load_block<B>(grad_output + channel),
          load_block<B>(tensors.output + item * channels + channel));
    }
    const A mean = sum_lanes<A>(products);
    const A logsumexp = tensors.logsumexp[item];

    for (int64_t first = 0; first < geometry.points; first += kGroup) {
      const int64_t point_offset = item * geometry.points + first;
      Group<A> group;
      group.locate(tensors.locations + 2 * point_offset, geometry, first);
      alignas(64) A weights[4][kGroup];
      group.corner_weights(ones.factors, weights);

      Vec<A> by_logit[kGroup] = {}, by_weight[kGroup] = {};
      for (int64_t channel = 0; channel < channels; channel += kChannels) {
        const B query_block = load_block<B>(query_row + channel);
        const B gradient = load_block<B>(grad_output + channel);
        for (int point = 0; point < group.count; ++point) {
          const CornerRows<const T> rows(task.value, scratch.zeros, group, point);
          const B sample = sample_block<B>(rows, channel, weights, point);
          add_product(by_weight[point], gradient, sample);
          B key_sample = sample;
          if (!shared) {
            const CornerRows<const T> key_rows(task.key, scratch.zeros, group, point);
            key_sample = sample_block<B>(key_rows, channel, weights, point);
          }
          add_product(by_logit[point], query_block, key_sample);
          store_block(key_samples + point * channels + channel, key_sample);
        }
      }
      A attention[kGroup], grad_logits[kGroup], logits[kGroup], grad_attention[kGroup];
      sum_lanes<A>(by_logit, logits);
      sum_lanes<A>(by_weight, grad_attention);
      for (int i = 0; i < kGroup; ++i) {
        attention[i] = exponential(logits[i] * tensors.scale - logsumexp);
        grad_logits[i] = attention[i] * (grad_attention[i] - mean) * tensors.scale;
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
          const CornerRows<const T> rows(task.value, scratch.zeros, group, point);
          const Slopes<B> slopes =
              sample_slopes<B>(rows, channel, group.right[point], group.lower[point]);
          add_product(by_x[point], grad_sample, slopes.along_x);
          add_product(by_y[point], grad_sample, slopes.along_y);
          const CornerRows<A> grad_rows(task.grad_value, scratch.discarded, group, point);
          scatter_block(grad_rows, channel, weights, point, grad_sample);
          if (!shared) {
            const CornerRows<const T> key_rows(task.key, scratch.zeros, group, point);
            const Slopes<B> key_slopes =
                sample_slopes<B>(key_rows, channel, group.right[point], group.lower[point]);
            add_product(by_x[point], grad_key_sample, key_slopes.along_x);
            add_product(by_y[point], grad_key_sample, key_slopes.along_y);
            const CornerRows<A> grad_key_rows(task.grad_key, scratch.discarded, group, point);
            scatter_block(grad_key_rows, channel, weights, point, grad_key_sample);
          }
        }
        store_block(query_sums + channel, query_sum);
      }
      A grad_x[kGroup], grad_y[kGroup];
      sum_lanes<A>(by_x, grad_x);
      sum_lanes<A>(by_y, grad_y);
      store_grad_locations(
          tensors.grad_locations + 2 * point_offset, group, geometry, first, grad_x, grad_y);
    }
    for (int64_t channel = 0; channel < channels; channel += kChannels) {
      store_block(
          tensors.grad_query + item * channels + channel, load_block<B>(query_sums + channel));
    }
  }
}

}  // namespace lite_detr::cpu::LITE_DETR_ISA
