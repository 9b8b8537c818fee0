// Multi-scale deformable attention: the weights of the points are given.
#pragma once

#include "samples.h"

namespace lite_detr::cpu::LITE_DETR_ISA {

template <typename T, int kChannels>
void msda_forward(
    const KernelGeometry& geometry, const Task<T>& task, const MsdaForward<T>& tensors) {
  using A = compute_t<T>;
  using B = Block<A, kChannels>;
  const int64_t channels = geometry.channels;
  const Scratch<T> scratch(task, channels);

  for (int64_t query = task.begin; query < task.end; ++query) {
    const int64_t item =
        (task.image * geometry.queries + query) * geometry.heads + task.head;
    const A* locations = tensors.locations + item * geometry.points * 2;
    const T* attention = tensors.weights + item * geometry.points;
    T* output = tensors.output + item * channels;

    for (int64_t channel = 0; channel < channels; channel += kChannels) {
      B sum = zero_block<B>();
      for (int64_t first = 0; first < geometry.points; first += kGroup) {
        Group<A> group;
        group.locate(locations + 2 * first, geometry, first);
        alignas(64) A factors[kGroup], weights[4][kGroup];
        load_group(attention + first, group.count, factors);
        group.corner_weights(factors, weights);
        for (int point = 0; point < group.count; ++point) {
          const CornerRows<const T> rows(task.value, scratch.zeros, group, point);
          for (int corner = 0; corner < 4; ++corner) {
            add_scaled(sum, weights[corner][point], load_block<B>(rows.row[corner] + channel));
          }
        }
      }
      store_block(output + channel, sum);
    }
  }
}

template <typename T, int kChannels>
void msda_backward(
    const KernelGeometry& geometry, const Task<T>& task, const MsdaBackward<T>& tensors) {
  using A = compute_t<T>;
  using B = Block<A, kChannels>;
  const int64_t channels = geometry.channels;
  const Scratch<T> scratch(task, channels);

  for (int64_t query = task.begin; query < task.end; ++query) {
    const int64_t item =
        (task.image * geometry.queries + query) * geometry.heads + task.head;
    const T* grad_output = tensors.grad_output + item * channels;

    for (int64_t first = 0; first < geometry.points; first += kGroup) {
      const int64_t point_offset = item * geometry.points + first;
      Group<A> group;
      group.locate(tensors.locations + 2 * point_offset, geometry, first);
      alignas(64) A factors[kGroup], weights[4][kGroup];
      load_group(tensors.weights + point_offset, group.count, factors);
      group.corner_weights(factors, weights);

      Vec<A> by_weight[kGroup] = {}, by_x[kGroup] = {}, by_y[kGroup] = {};
      for (int64_t channel = 0; channel < channels; channel += kChannels) {
        const B gradient = load_block<B>(grad_output + channel);
        for (int point = 0; point < group.count; ++point) {
          const CornerRows<const T> rows(task.value, scratch.zeros, group, point);
          const Slopes<B> slopes =
              sample_slopes<B>(rows, channel, group.right[point], group.lower[point]);
          add_product(by_weight[point], gradient, slopes.sample);
          add_product(by_x[point], gradient, slopes.along_x);
          add_product(by_y[point], gradient, slopes.along_y);
          const CornerRows<A> grad_rows(task.grad_value, scratch.discarded, group, point);
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
      }
      store_group(tensors.grad_weights + point_offset, group.count, grad_weights);
      store_grad_locations(
          tensors.grad_locations + 2 * point_offset, group, geometry, first, grad_x, grad_y);
    }
  }
}

}  // namespace lite_detr::cpu::LITE_DETR_ISA
