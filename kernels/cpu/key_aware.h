// Key-aware deformable attention: the weights are a softmax over query times sampled keys.
//
// The samples of one group of points are held at a time; the softmax goes on from group to group,
// relative to the largest logit so far. The backward pass samples again, and computes the weights
// from the saved logsumexp.
#pragma once

#include "msda.h"

namespace lite_detr::cpu::LITE_DETR_ISA {

template <typename T, typename Points, typename Layout, int kChannels>
void key_aware_forward(
    const KernelGeometry& geometry, const Task<T>& task,
    const KeyAwareForward<T, Points>& tensors) {
  using A = compute_t<T>;
  using B = Block<A, kChannels>;
  struct Place {
    alignas(64) A weights[4][kGroup];
    CornerRows<const T, Layout> rows, key_rows;
  };
  const int64_t channels = Layout::channels(geometry), points = geometry.points;
  const int64_t groups = groups_of_query(geometry);
  const int64_t together = groups_together(geometry) / groups;
  const Scratch<T, Place> scratch(task, geometry);
  const Ones<A> ones;
  const bool shared = task.key.first == nullptr;

  for (int64_t begin = task.begin; begin < task.end; begin += together) {
    const int64_t count = task.end - begin < together ? task.end - begin : together;
    A maxima[kTogether], totals[kTogether];
    for (int64_t i = 0; i < count; ++i) {
      const Item item(geometry, task, begin + i);
      maxima[i] = kLowest<A>;
      totals[i] = 0;
      const int64_t later = item.index + kPrefetched * geometry.heads;
      prefetch_points(tensors.points, geometry, later);
      prefetch<false>(tensors.query, channels, later);
      prefetch<true>(tensors.output, channels, later);
      for (int64_t first = 0; first < points; first += kGroup) {
        Place& place = scratch.places[i * groups + first / kGroup];
        Group<A> group;
        group.template find<Layout::kBordered>(tensors.points, geometry, item, first, points);
        group.corner_weights(ones.factors, place.weights);
        place.rows.find(task.value, scratch.zeros, group);
        if (!shared) place.key_rows.find(task.key, scratch.zeros, group);
      }
    }

    for (int64_t first = 0; first < points; first += kGroup) {
      const int in_group = count_in_group(first, points);
      const bool is_last = first + kGroup >= points;
      alignas(64) A logits[kTogether][kGroup], attention[kTogether][kGroup];
      A earlier[kTogether];
      for (int64_t i = 0; i < count; ++i) {
        const Item item(geometry, task, begin + i);
        const T* query_row = tensors.query + item.index * channels;
        const Place& place = scratch.places[i * groups + first / kGroup];
        A* samples = scratch.samples + i * kGroup * channels;
        Vec<A> products[kGroup] = {};
        for (int64_t channel = 0; channel < channels; channel += kChannels) {
          const B query_block = load_block<B>(query_row + channel);
          for (int point = 0; point < in_group; ++point) {
            const B sample = sample_block<B>(place.rows, channel, place.weights, point);
            store_block(samples + point * channels + channel, sample);
            if (shared) {
              add_product(products[point], query_block, sample);
            } else {
              add_product(
                  products[point], query_block,
                  sample_block<B>(place.key_rows, channel, place.weights, point));
            }
          }
        }
        sum_lanes<A>(products, logits[i]);
      }
      for (int64_t i = 0; i < count; ++i) {
        for (int j = 0; j < kGroup; ++j) {
          logits[i][j] = j < in_group ? logits[i][j] * tensors.scale : kLowest<A>;
        }
        Vec<A> largest = load(logits[i]);
        for (int j = kLanes<A>; j < kGroup; j += kLanes<A>) {
          const Vec<A> others = load(logits[i] + j);
          largest = largest > others ? largest : others;
        }
        const A group_maximum = max_lanes<A>(largest);
        const A new_maximum = group_maximum > maxima[i] ? group_maximum : maxima[i];
        Vec<A> partial_total = {};
        for (int j = 0; j < kGroup; j += kLanes<A>) {
          const Vec<A> powers = exponential(load(logits[i] + j) - new_maximum);
          partial_total += powers;
          store(attention[i] + j, powers);
        }
        earlier[i] = first == 0 ? A(0) : exponential(maxima[i] - new_maximum);
        maxima[i] = new_maximum;
        totals[i] = totals[i] * earlier[i] + sum_lanes<A>(partial_total);
      }
      for (int64_t i = 0; i < count; ++i) {
        const Item item(geometry, task, begin + i);
        const A* samples = scratch.samples + i * kGroup * channels;
        A* sums = scratch.sums + i * channels;
        const A share = 1 / totals[i];
        for (int64_t channel = 0; channel < channels; channel += kChannels) {
          B sum = zero_block<B>();
          if (first > 0) add_scaled(sum, earlier[i], load_block<B>(sums + channel));
          for (int point = 0; point < in_group; ++point) {
            add_scaled(
                sum, attention[i][point], load_block<B>(samples + point * channels + channel));
          }
          if (is_last) {
            B result = zero_block<B>();
            add_scaled(result, share, sum);
            store_block(tensors.output + item.index * channels + channel, result);
          } else {
            store_block(sums + channel, sum);
          }
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const Item item(geometry, task, begin + i);
      tensors.logsumexp[item.index] = maxima[i] + logarithm(totals[i]);
    }
  }
}

template <typename T, typename Points, typename Layout, int kChannels>
void key_aware_backward(
    const KernelGeometry& geometry, const Task<T>& task,
    const KeyAwareBackward<T, Points>& tensors) {
  using A = compute_t<T>;
  using B = Block<A, kChannels>;
  struct Place {
    alignas(64) A weights[4][kGroup];
    alignas(64) A right[kGroup], lower[kGroup];
    alignas(64) A attention[kGroup], grad_logits[kGroup];
    CornerRows<const T, Layout> rows, key_rows;
    CornerRows<A, Layout> grad_rows, grad_key_rows;
  };
  const int64_t channels = Layout::channels(geometry);
  const int64_t groups = groups_of_query(geometry);
  const int64_t together = groups_together(geometry) / groups;
  const Scratch<T, Place> scratch(task, geometry);
  const Ones<A> ones;
  const bool shared = task.key.first == nullptr;
  const int64_t first_level = geometry.level[task.first_point];
  const int64_t last_level = geometry.level[task.end_point - 1];

  for (int64_t begin = task.begin; begin < task.end; begin += together) {
    const int64_t count = task.end - begin < together ? task.end - begin : together;
    for (int64_t i = 0; i < count; ++i) {
      const Item item(geometry, task, begin + i);
      const int64_t later = item.index + kPrefetched * geometry.heads;
      prefetch_points(tensors.points, geometry, later);
      prefetch<false>(tensors.query, channels, later);
      prefetch<false>(tensors.output, channels, later);
      prefetch<false>(tensors.grad_output, channels, later);
      prefetch_gradients(tensors.points, geometry, later);
      prefetch<true>(tensors.grad_query, channels, later);
      Place* place = scratch.places + i * groups;
      for (int64_t first = task.first_point; first < task.end_point; first += kGroup, ++place) {
        Group<A> group;
        group.template find<Layout::kBordered>(
            tensors.points, geometry, item, first, task.end_point);
        group.corner_weights(ones.factors, place->weights);
        std::memcpy(place->right, group.right, sizeof(place->right));
        std::memcpy(place->lower, group.lower, sizeof(place->lower));
        place->rows.find(task.value, nullptr, group);
        place->grad_rows.find(task.grad_value, nullptr, group);
        if (!shared) {
          place->key_rows.find(task.key, nullptr, group);
          place->grad_key_rows.find(task.grad_key, nullptr, group);
        }
      }
    }

    for (int64_t i = 0; i < count; ++i) {
      const Item item(geometry, task, begin + i);
      const T* query_row = tensors.query + item.index * channels;
      const T* grad_output = tensors.grad_output + item.index * channels;
      Place* place = scratch.places + i * groups;
      A* key_samples = scratch.samples + i * groups * kGroup * channels;
      for (int64_t first = task.first_point; first < task.end_point; first += kGroup, ++place) {
        const int in_group = count_in_group(first, task.end_point);
        Vec<A> by_logit[kGroup] = {}, by_weight[kGroup] = {};
        for (int64_t channel = 0; channel < channels; channel += kChannels) {
          const B query_block = load_block<B>(query_row + channel);
          const B gradient = load_block<B>(grad_output + channel);
          for (int point = 0; point < in_group; ++point) {
            const B sample = sample_block<B>(place->rows, channel, place->weights, point);
            add_product(by_weight[point], gradient, sample);
            B key_sample = sample;
            if (!shared) {
              key_sample = sample_block<B>(place->key_rows, channel, place->weights, point);
            }
            add_product(by_logit[point], query_block, key_sample);
            store_block(key_samples + point * channels + channel, key_sample);
          }
        }
        // Of logits and weights until the next loop.
        sum_lanes<A>(by_logit, place->attention);
        sum_lanes<A>(by_weight, place->grad_logits);
        key_samples += kGroup * channels;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const Item item(geometry, task, begin + i);
      // The softmax's Jacobian subtracts the mean of the weights' gradients, which is the product of
      // the output and its gradient.
      const A mean = dot<A, B>(
          tensors.grad_output + item.index * channels, tensors.output + item.index * channels,
          channels);
      const A logsumexp = tensors.logsumexp[item.index];
      Place* place = scratch.places + i * groups;
      for (int64_t first = task.first_point; first < task.end_point; first += kGroup, ++place) {
        for (int j = 0; j < kGroup; j += kLanes<A>) {
          const Vec<A> weight =
              exponential(load(place->attention + j) * tensors.scale - logsumexp);
          store(place->attention + j, weight);
          store(
              place->grad_logits + j,
              weight * (load(place->grad_logits + j) - mean) * tensors.scale);
        }
      }
    }
    // Each row gets its sums query by query and point by point.
    for (int64_t i = 0; i < count; ++i) {
      const Item item(geometry, task, begin + i);
      const T* query_row = tensors.query + item.index * channels;
      const T* grad_output = tensors.grad_output + item.index * channels;
      const Place* place = scratch.places + i * groups;
      const A* key_samples = scratch.samples + i * groups * kGroup * channels;
      for (int64_t first = task.first_point; first < task.end_point; first += kGroup, ++place) {
        const int in_group = count_in_group(first, task.end_point);
        Vec<A> by_x[kGroup] = {}, by_y[kGroup] = {};
        for (int64_t channel = 0; channel < channels; channel += kChannels) {
          const B query_block = load_block<B>(query_row + channel);
          const B gradient = load_block<B>(grad_output + channel);
          for (int point = 0; point < in_group;) {
            const int32_t level = geometry.level[first + point];
            A* level_sum = scratch.level_sums + level * channels + channel;
            const bool is_new = first + point == task.first_point ||
                geometry.level[first + point - 1] != level;
            B sum = is_new ? zero_block<B>() : load_block<B>(level_sum);
            do {
              const A weight = place->attention[point], grad_logit = place->grad_logits[point];
              add_scaled(
                  sum, grad_logit, load_block<B>(key_samples + point * channels + channel));
              B grad_sample = zero_block<B>(), grad_key_sample = zero_block<B>();
              add_scaled(grad_sample, weight, gradient);
              add_scaled(grad_key_sample, grad_logit, query_block);
              if (shared) add_scaled(grad_sample, A(1), grad_key_sample);
              const A right = place->right[point], lower = place->lower[point];
              const Slopes<B> slopes =
                  sample_slopes<B>(place->rows, channel, right, lower, point);
              add_product(by_x[point], grad_sample, slopes.along_x);
              add_product(by_y[point], grad_sample, slopes.along_y);
              scatter_block(place->grad_rows, channel, place->weights, point, grad_sample);
              if (!shared) {
                const Slopes<B> key_slopes =
                    sample_slopes<B>(place->key_rows, channel, right, lower, point);
                add_product(by_x[point], grad_key_sample, key_slopes.along_x);
                add_product(by_y[point], grad_key_sample, key_slopes.along_y);
                scatter_block(
                    place->grad_key_rows, channel, place->weights, point, grad_key_sample);
              }
              ++point;
            } while (point < in_group && geometry.level[first + point] == level);
            store_block(level_sum, sum);
          }
        }
        alignas(64) A grad_x[kGroup], grad_y[kGroup];
        sum_lanes<A>(by_x, grad_x);
        sum_lanes<A>(by_y, grad_y);
        store_grad_points(tensors.points, geometry, item, first, in_group, grad_x, grad_y);
        key_samples += kGroup * channels;
      }
      // The levels' sums are added in their order, here or when all tasks have given theirs.
      for (int64_t channel = 0; channel < channels; channel += kChannels) {
        B total = zero_block<B>();
        for (int64_t level = first_level; level <= last_level; ++level) {
          const B sum = load_block<B>(scratch.level_sums + level * channels + channel);
          if (task.level_sums != nullptr) {
            store_block(
                task.level_sums + (level * task.items + item.index) * channels + channel, sum);
          }
          add_scaled(total, A(1), sum);
        }
        if (task.level_sums == nullptr) {
          store_block(tensors.grad_query + item.index * channels + channel, total);
        }
      }
    }
  }
}

}  // namespace lite_detr::cpu::LITE_DETR_ISA
