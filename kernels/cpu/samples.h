// Bilinear sampling of a group of points, which both attentions share.
#pragma once

#include "vector.h"

namespace lite_detr::cpu::LITE_DETR_ISA {

// The rows of D channels in a task's scratch memory.
template <typename T>
struct Scratch {
  using A = compute_t<T>;
  const T* zeros;
  A* discarded;
  A* first;   // one row for each point of a group
  A* second;  // the same again

  Scratch(const Task<T>& task, int64_t channels) {
    zeros = reinterpret_cast<const T*>(task.scratch);
    discarded = task.scratch + channels;
    first = discarded + channels;
    second = first + kGroup * channels;
  }
};

// Loads up to kGroup numbers, and zeros after them.
template <typename T>
LITE_DETR_INLINE void load_group(const T* source, int count, compute_t<T>* target) {
  T padded[kGroup];
  if (count < kGroup) {
    std::memset(padded, 0, sizeof(padded));
    std::memcpy(padded, source, count * sizeof(T));
    source = padded;
  }
  constexpr int kStep = kLanes<compute_t<T>>;
  for (int i = 0; i < kGroup; i += kStep) store(target + i, load(source + i));
}

template <typename T>
LITE_DETR_INLINE void store_group(T* target, int count, const compute_t<T>* source) {
  T padded[kGroup];
  constexpr int kStep = kLanes<compute_t<T>>;
  for (int i = 0; i < kGroup; i += kStep) store(padded + i, load(source + i));
  std::memcpy(target, padded, count * sizeof(T));
}

// A register's worth of channels; most detectors have 32 in a head.
template <typename A, int kChannels>
struct Block {
  static constexpr int kVectors = kChannels / kLanes<A>;
  Vec<A> part[kVectors];
};

template <typename B>
LITE_DETR_INLINE B zero_block() {
  return B{};
}

template <typename B, typename T>
LITE_DETR_INLINE B load_block(const T* source) {
  B block;
  for (int i = 0; i < B::kVectors; ++i) {
    block.part[i] = load(source + i * (sizeof(block.part[0]) / sizeof(block.part[0][0])));
  }
  return block;
}

template <typename B, typename T>
LITE_DETR_INLINE void store_block(T* target, const B& block) {
  for (int i = 0; i < B::kVectors; ++i) {
    store(target + i * (sizeof(block.part[0]) / sizeof(block.part[0][0])), block.part[i]);
  }
}

// sum += factor * block
template <typename B, typename A>
LITE_DETR_INLINE void add_scaled(B& sum, A factor, const B& block) {
  for (int i = 0; i < B::kVectors; ++i) sum.part[i] += factor * block.part[i];
}

// sum += a * b, lane by lane; the lanes are summed later.
template <typename V, typename B>
LITE_DETR_INLINE void add_product(V& sum, const B& a, const B& b) {
  for (int i = 0; i < B::kVectors; ++i) sum += a.part[i] * b.part[i];
}

// The corners of a group of points: an array for each field, so that the search is vectorised.
template <typename A>
struct Group {
  alignas(64) int32_t token[4][kGroup];
  alignas(64) A right[kGroup];
  alignas(64) A lower[kGroup];
  int count;  // points in the group; the others lie outside every map

  void locate(const A* locations, const KernelGeometry& geometry, int64_t first) {
    A padded[2 * kGroup];
    const int64_t remaining = geometry.points - first;
    count = remaining < kGroup ? int(remaining) : kGroup;
    if (count < kGroup) {
      std::memset(padded, 0, sizeof(padded));
      std::memcpy(padded, locations, 2 * count * sizeof(A));
      locations = padded;
    }
    const int32_t* width = geometry.width + first;
    const int32_t* height = geometry.height + first;
    const int32_t* start = geometry.start + first;
    for (int i = 0; i < kGroup; ++i) {
      const Corners<A> corners =
          find_corners(locations[2 * i], locations[2 * i + 1], width[i], height[i], start[i]);
      for (int corner = 0; corner < 4; ++corner) token[corner][i] = corners.token[corner];
      right[i] = corners.right;
      lower[i] = corners.lower;
    }
  }

  // Computes the bilinear weight of each corner, times a factor for each point.
  void corner_weights(const A* factors, A (*weights)[kGroup]) const {
    for (int i = 0; i < kGroup; i += kLanes<A>) {
      const Vec<A> factor = load(factors + i);
      const Vec<A> right_part = load(right + i) * factor, left_part = factor - right_part;
      const Vec<A> lower_share = load(lower + i), upper_share = 1 - lower_share;
      store(weights[0] + i, left_part * upper_share);
      store(weights[1] + i, right_part * upper_share);
      store(weights[2] + i, left_part * lower_share);
      store(weights[3] + i, right_part * lower_share);
    }
  }
};

template <typename A>
struct Ones {
  A factors[kGroup];
  Ones() {
    for (A& factor : factors) factor = 1;
  }
};

// The gradients of `count` locations, from those of the position inside the cell.
template <typename A>
LITE_DETR_INLINE void store_grad_locations(
    A* target, const Group<A>& group, const KernelGeometry& geometry, int64_t first,
    const A* along_x, const A* along_y) {
  A interleaved[2 * kGroup];
  for (int i = 0; i < kGroup; ++i) {
    interleaved[2 * i] = along_x[i] * A(geometry.width[first + i]);
    interleaved[2 * i + 1] = along_y[i] * A(geometry.height[first + i]);
  }
  std::memcpy(target, interleaved, 2 * group.count * sizeof(A));
}

// The rows at the four corners of a point. `outside` replaces rows outside the map: there is no
// branch, and no invalid number elsewhere in the map is read.
template <typename T>
struct CornerRows {
  T* row[4];

  template <typename A>
  LITE_DETR_INLINE CornerRows(
      const TokenRows<T>& rows, T* outside, const Group<A>& group, int point) {
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      const int32_t token = group.token[corner][point];
      row[corner] = token < 0 ? outside : rows.first + token * rows.stride;
    }
  }
};

// A sampled block and its slopes with respect to the position inside the cell.
template <typename B>
struct Slopes {
  B sample;
  B along_x;
  B along_y;
};

template <typename B, typename T, typename A>
LITE_DETR_INLINE B sample_block(
    const CornerRows<const T>& rows, int64_t channel, const A (*weights)[kGroup], int point) {
  B sum = zero_block<B>();
  for (int corner = 0; corner < 4; ++corner) {
    add_scaled(sum, weights[corner][point], load_block<B>(rows.row[corner] + channel));
  }
  return sum;
}

template <typename B, typename T, typename A>
LITE_DETR_INLINE Slopes<B> sample_slopes(
    const CornerRows<const T>& rows, int64_t channel, A right, A lower) {
  const B a = load_block<B>(rows.row[0] + channel), b = load_block<B>(rows.row[1] + channel);
  const B c = load_block<B>(rows.row[2] + channel), d = load_block<B>(rows.row[3] + channel);
  Slopes<B> result;
  for (int i = 0; i < B::kVectors; ++i) {
    const auto top = b.part[i] - a.part[i];
    const auto bottom = d.part[i] - c.part[i];
    const auto upper = a.part[i] + right * top;
    result.along_y.part[i] = (c.part[i] + right * bottom) - upper;
    result.along_x.part[i] = top + lower * (bottom - top);
    result.sample.part[i] = upper + lower * result.along_y.part[i];
  }
  return result;
}

// Adds weight * gradient to each corner's row.
template <typename B, typename A>
LITE_DETR_INLINE void scatter_block(
    const CornerRows<A>& rows, int64_t channel, const A (*weights)[kGroup], int point,
    const B& gradient) {
  for (int corner = 0; corner < 4; ++corner) {
    A* target = rows.row[corner] + channel;
    B sum = load_block<B>(target);
    add_scaled(sum, weights[corner][point], gradient);
    store_block(target, sum);
  }
}

}  // namespace lite_detr::cpu::LITE_DETR_ISA
