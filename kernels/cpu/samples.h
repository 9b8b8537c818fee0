// Bilinear sampling of a group of points, which both attentions share.
#pragma once

#include "vector.h"

namespace lite_detr::cpu::LITE_DETR_ISA {

// The parts of a task's scratch memory. `Place` is what a kernel keeps of a group of points.
template <typename T, typename Place>
struct Scratch {
  using A = compute_t<T>;
  static_assert(sizeof(Place) <= kPlaceBytes);
  Place* places;  // of the groups found together
  A* weights;     // of their points
  const T* zeros;
  A* samples;     // one row for each of their points
  A* sums;        // one row for each of their queries
  A* level_sums;  // one row for each level

  Scratch(const Task<T>& task, const KernelGeometry& geometry) {
    const int64_t groups = groups_together(geometry), channels = geometry.channels;
    places = static_cast<Place*>(task.scratch);
    weights = reinterpret_cast<A*>(static_cast<char*>(task.scratch) + groups * kPlaceBytes);
    A* row = weights + groups * kGroup;
    std::memset(row, 0, channels * sizeof(A));
    zeros = reinterpret_cast<const T*>(row);
    samples = row + channels;
    sums = samples + groups * kGroup * channels;
    level_sums = sums + kTogether * channels;
  }
};

// Loads up to kCount numbers, and zeros after them.
template <int kCount = kGroup, typename T>
LITE_DETR_INLINE void load_group(const T* source, int count, compute_t<T>* target) {
  T padded[kCount];
  if (count < kCount) {
    std::memset(padded, 0, sizeof(padded));
    std::memcpy(padded, source, count * sizeof(T));
    source = padded;
  }
  constexpr int kStep = kLanes<compute_t<T>>;
  for (int i = 0; i < kCount; i += kStep) store(target + i, load(source + i));
}

template <int kCount = kGroup, typename T>
LITE_DETR_INLINE void store_group(T* target, int count, const compute_t<T>* source) {
  T padded[kCount];
  constexpr int kStep = kLanes<compute_t<T>>;
  for (int i = 0; i < kCount; i += kStep) store(padded + i, load(source + i));
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

// Blocks of bfloat16 are loaded with channels 0, 2, 4, ... in one register and channels 1, 3, 5, ...
// in the next, as these are the halves of 32-bit integers. Kernels do not care which channel is in
// which lane, as long as all blocks of a head, also those stored as float, have the same order.
template <typename B, typename T>
constexpr bool kInPairs = std::is_same_v<T, BFloat16> && B::kVectors % 2 == 0;

template <typename B, typename T>
LITE_DETR_INLINE B load_block(const T* source) {
  constexpr int kLanesOfPart = sizeof(B::part[0]) / sizeof(B::part[0][0]);
  B block;
  if constexpr (kInPairs<B, T>) {
    for (int i = 0; i < B::kVectors; i += 2) {
      const auto pairs = load_bytes<FloatLanes<uint32_t>>(source + i * kLanesOfPart);
      block.part[i] = (Vec<float>)(pairs << 16);
      block.part[i + 1] = (Vec<float>)(pairs & 0xffff0000);
    }
  } else {
    for (int i = 0; i < B::kVectors; ++i) block.part[i] = load(source + i * kLanesOfPart);
  }
  return block;
}

template <typename B, typename T>
LITE_DETR_INLINE void store_block(T* target, const B& block) {
  constexpr int kLanesOfPart = sizeof(B::part[0]) / sizeof(B::part[0][0]);
  if constexpr (kInPairs<B, T>) {
    for (int i = 0; i < B::kVectors; i += 2) {
      const auto pairs = round_to_bfloat16(block.part[i]) |
          (round_to_bfloat16(block.part[i + 1]) << 16);
      std::memcpy(target + i * kLanesOfPart, &pairs, sizeof(pairs));
    }
  } else {
    for (int i = 0; i < B::kVectors; ++i) store(target + i * kLanesOfPart, block.part[i]);
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

// The product of two rows.
template <typename A, typename B, typename T>
LITE_DETR_INLINE A dot(const T* a, const T* b, int64_t channels) {
  Vec<A> products = {};
  for (int64_t channel = 0; channel < channels; channel += B::kVectors * kLanes<A>) {
    add_product(products, load_block<B>(a + channel), load_block<B>(b + channel));
  }
  return sum_lanes<A>(products);
}

// One query and head, and where its data begin.
struct Item {
  int64_t query;  // of B * Q
  int64_t index;  // of B * Q * M

  template <typename T>
  Item(const KernelGeometry& geometry, const Task<T>& task, int64_t number)
      : query(task.image * geometry.queries + number), index(query * geometry.heads + task.head) {}
};

// What the offsets of a group of points start from, and their units in cells.
template <typename T>
struct Origin {
  using A = compute_t<T>;
  alignas(64) A x[kGroup];
  alignas(64) A y[kGroup];
  alignas(64) A step_x[kGroup];
  alignas(64) A step_y[kGroup];

  LITE_DETR_INLINE Origin(
      const Offsets<T>& points, const KernelGeometry& geometry, const Item& item, int64_t first) {
    const int32_t coordinates = points.coordinates;
    const A* references = points.references + item.query * geometry.levels * coordinates;
    const int count = int(geometry.levels) * coordinates;
    alignas(64) int32_t indices[kGroup];
    for (int i = 0; i < kGroup; ++i) indices[i] = geometry.level[first + i] * coordinates;
    look_up(references, count, indices, 0, x);
    look_up(references, count, indices, 1, y);
    if (coordinates == 2) {
      for (int i = 0; i < kGroup; ++i) step_x[i] = step_y[i] = 1;
    } else {
      look_up(references, count, indices, 2, step_x);
      look_up(references, count, indices, 3, step_y);
      for (int i = 0; i < kGroup; ++i) {
        step_x[i] *= points.step * A(geometry.width[first + i]);
        step_y[i] *= points.step * A(geometry.height[first + i]);
      }
    }
  }
};

// A position in cells: (0, 0) is the centre of the first one.
template <typename A>
struct Position {
  Vec<A> column;
  Vec<A> row;
};

// The points of a group, of points [first, end).
LITE_DETR_INLINE int count_in_group(int64_t first, int64_t end) {
  return end - first < kGroup ? int(end - first) : kGroup;
}

// The corners of a group of points: an array for each field.
template <typename A>
struct Group {
  alignas(64) int32_t corner[kGroup];      // the top left row; without a border perhaps none
  alignas(64) int32_t missing[4][kGroup];  // without a border, -1 for corners outside the map, or 0
  alignas(64) A right[kGroup];
  alignas(64) A lower[kGroup];
  const int32_t* pitch;  // of each point's level
  int count;             // points in the group; the others are never sampled

  // `end`: of the points that are sampled.
  template <bool kBordered, typename T>
  LITE_DETR_INLINE void find(
      const Locations<T>& points, const KernelGeometry& geometry, const Item& item, int64_t first,
      int64_t end) {
    begin(geometry, first, end);
    A locations[2 * kGroup];
    load_pairs(points.locations + (item.index * geometry.points + first) * 2, locations);
    locate<kBordered>(
        geometry, first, locations, [](int, Vec<A> x, Vec<A> y, Vec<A> columns, Vec<A> rows) {
          return Position<A>{x * columns - A(0.5), y * rows - A(0.5)};
        });
  }

  template <bool kBordered, typename T>
  LITE_DETR_INLINE void find(
      const Offsets<T>& points, const KernelGeometry& geometry, const Item& item, int64_t first,
      int64_t end) {
    begin(geometry, first, end);
    A offsets[2 * kGroup];
    load_pairs(points.offsets + (item.index * geometry.points + first) * 2, offsets);
    const Origin<T> origin(points, geometry, item, first);
    locate<kBordered>(
        geometry, first, offsets,
        [&](int i, Vec<A> x, Vec<A> y, Vec<A> columns, Vec<A> rows) {
          return Position<A>{
              load(origin.x + i) * columns - A(0.5) + x * load(origin.step_x + i),
              load(origin.y + i) * rows - A(0.5) + y * load(origin.step_y + i)};
        });
  }

  // Computes the bilinear weight of each corner, times a factor for each point.
  LITE_DETR_INLINE void corner_weights(const A* factors, A (*weights)[kGroup]) const {
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

 private:
  LITE_DETR_INLINE void begin(const KernelGeometry& geometry, int64_t first, int64_t end) {
    count = count_in_group(first, end);
    pitch = geometry.pitch + first;
  }

  template <typename T>
  LITE_DETR_INLINE void load_pairs(const T* source, A* pairs) const {
    load_group<2 * kGroup>(source, 2 * count, pairs);
  }

  // Finds the corners of as many points at once as a vector has lanes, without branches. A position
  // that is NaN, infinite or outside the map fails the comparison and becomes a cell that is never
  // read, or the zeros before the first level, before a conversion to an integer could overflow.
  // `position` turns pairs (x, y) into cells, given the columns and rows of their levels.
  template <bool kBordered, typename GetPosition>
  LITE_DETR_INLINE void locate(
      const KernelGeometry& geometry, int64_t first, const A* pairs, GetPosition position) {
    constexpr std::make_integer_sequence<int, kLanes<A>> lanes;
    for (int i = 0; i < kGroup; i += kLanes<A>) {
      const auto columns = load_bytes<Ints<A>>(geometry.width + first + i);
      const auto rows = load_bytes<Ints<A>>(geometry.height + first + i);
      const auto start = load_bytes<Ints<A>>(geometry.first + first + i);
      const auto step = load_bytes<Ints<A>>(geometry.pitch + first + i);
      const Vec<A> exact_columns = __builtin_convertvector(columns, Vec<A>);
      const Vec<A> exact_rows = __builtin_convertvector(rows, Vec<A>);
      const Vec<A> a = load(pairs + 2 * i), b = load(pairs + 2 * i + kLanes<A>);
      const Position<A> given = position(
          i, every_second<0>(a, b, lanes), every_second<1>(a, b, lanes), exact_columns,
          exact_rows);
      // All bits of a lane are set where the comparison holds.
      const auto inside = (given.column > -1) & (given.column < exact_columns) &
          (given.row > -1) & (given.row < exact_rows);
      const Vec<A> column = inside ? given.column : Vec<A>{};
      const Vec<A> row = inside ? given.row : Vec<A>{};
      Ints<A> left = __builtin_convertvector(column, Ints<A>);
      Ints<A> upper = __builtin_convertvector(row, Ints<A>);
      left += __builtin_convertvector(column < __builtin_convertvector(left, Vec<A>), Ints<A>);
      upper += __builtin_convertvector(row < __builtin_convertvector(upper, Vec<A>), Ints<A>);
      const Ints<A> exists = __builtin_convertvector(inside, Ints<A>);
      const Ints<A> token = start + upper * step + left;
      if constexpr (kBordered) {
        store_ints(corner + i, token & exists);
      } else {
        const Ints<A> has_left = exists & (left >= 0), has_right = exists & (left + 1 < columns);
        const Ints<A> has_upper = upper >= 0, has_lower = upper + 1 < rows;
        store_ints(missing[0] + i, ~(has_left & has_upper));
        store_ints(missing[1] + i, ~(has_right & has_upper));
        store_ints(missing[2] + i, ~(has_left & has_lower));
        store_ints(missing[3] + i, ~(has_right & has_lower));
        store_ints(corner + i, token);
      }
      store(right + i, column - __builtin_convertvector(left, Vec<A>));
      store(lower + i, row - __builtin_convertvector(upper, Vec<A>));
    }
  }

  static LITE_DETR_INLINE void store_ints(int32_t* target, Ints<A> ints) {
    std::memcpy(target, &ints, sizeof(ints));
  }
};

// Asks for the cache lines of data that the same head of a later query needs: a head's parts of
// neighbouring queries are too far apart for the hardware to foresee them.
template <bool kWrite, typename T>
LITE_DETR_INLINE void prefetch(const T* rows, int64_t size, int64_t index) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(rows) + uintptr_t(index * size) * sizeof(T);
  for (uintptr_t line = 0; line < uintptr_t(size) * sizeof(T); line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(begin + line), kWrite ? 1 : 0);
  }
}

// How many queries ahead of their use data are prefetched.
constexpr int kPrefetched = 16;

template <typename T>
LITE_DETR_INLINE void prefetch_points(
    const Locations<T>& points, const KernelGeometry& geometry, int64_t index) {
  prefetch<false>(points.locations, 2 * geometry.points, index);
}
template <typename T>
LITE_DETR_INLINE void prefetch_points(
    const Offsets<T>& points, const KernelGeometry& geometry, int64_t index) {
  prefetch<false>(points.offsets, 2 * geometry.points, index);
}

template <typename T>
LITE_DETR_INLINE void prefetch_gradients(
    const Locations<T>& points, const KernelGeometry& geometry, int64_t index) {
  prefetch<true>(points.gradient, 2 * geometry.points, index);
}
template <typename T>
LITE_DETR_INLINE void prefetch_gradients(
    const Offsets<T>& points, const KernelGeometry& geometry, int64_t index) {
  prefetch<true>(points.gradient, 2 * geometry.points, index);
  if (points.grad_positions != nullptr) {
    prefetch<true>(points.grad_positions, 2 * geometry.points, index);
  }
}

template <typename A>
struct Ones {
  A factors[kGroup];
  Ones() {
    for (A& factor : factors) factor = 1;
  }
};

// Stores the gradient of where a group's points lie, from that of their positions in cells.
template <typename T, typename A>
LITE_DETR_INLINE void store_grad_points(
    const Locations<T>& points, const KernelGeometry& geometry, const Item& item, int64_t first,
    int count, const A* along_x, const A* along_y) {
  A pairs[2 * kGroup];
  for (int i = 0; i < kGroup; ++i) {
    pairs[2 * i] = along_x[i] * A(geometry.width[first + i]);
    pairs[2 * i + 1] = along_y[i] * A(geometry.height[first + i]);
  }
  A* target = points.gradient + (item.index * geometry.points + first) * 2;
  std::memcpy(target, pairs, 2 * count * sizeof(A));
}

template <typename T, typename A>
LITE_DETR_INLINE void store_grad_points(
    const Offsets<T>& points, const KernelGeometry& geometry, const Item& item, int64_t first,
    int count, const A* along_x, const A* along_y) {
  A pairs[2 * kGroup];
  for (int i = 0; i < kGroup; ++i) {
    pairs[2 * i] = along_x[i];
    pairs[2 * i + 1] = along_y[i];
  }
  const int64_t target = (item.index * geometry.points + first) * 2;
  if (points.grad_positions != nullptr) {
    std::memcpy(points.grad_positions + target, pairs, 2 * count * sizeof(A));
  }
  if (points.coordinates == 4) {
    const Origin<T> origin(points, geometry, item, first);
    for (int i = 0; i < kGroup; ++i) {
      pairs[2 * i] *= origin.step_x[i];
      pairs[2 * i + 1] *= origin.step_y[i];
    }
  }
  store_group<2 * kGroup>(points.gradient + target, 2 * count, pairs);
}

// Where the rows of a head lie in memory. Between rows with a border, the corner to the right is the
// next row; kRow is their number of channels, or 0 if the compiler cannot know it.
template <int kRow>
struct Bordered {
  static constexpr bool kBordered = true;
  static LITE_DETR_INLINE int64_t channels(const KernelGeometry& geometry) {
    return kRow > 0 ? kRow : geometry.channels;
  }
};
// Rows that are read where they are.
struct InPlace {
  static constexpr bool kBordered = false;
  static LITE_DETR_INLINE int64_t channels(const KernelGeometry& geometry) {
    return geometry.channels;
  }
};

// The rows at the corners of a group's points, whose addresses are computed together, by vectors. A
// corner outside the map has a row too, so nothing branches, and NaN elsewhere in the map is not read.
template <typename T, typename Layout>
class CornerRows;

template <typename T, int kRow>
class CornerRows<T, Bordered<kRow>> {
 public:
  template <typename A>
  LITE_DETR_INLINE void find(const TokenRows<T>& rows, const void*, const Group<A>& group) {
    row_ = uint32_t(rows.stride * sizeof(T));
    const uint64_t base = reinterpret_cast<uint64_t>(rows.first), bytes = row_bytes();
    for (int i = 0; i < kGroup; ++i) {
      upper_[i] = base + uint64_t(uint32_t(group.corner[i])) * bytes;
      lower_[i] = upper_[i] + uint64_t(uint32_t(group.pitch[i])) * bytes;
    }
  }

  LITE_DETR_INLINE T* at(int corner, int point) const {
    return reinterpret_cast<T*>(
        (corner < 2 ? upper_ : lower_)[point] + (corner % 2) * uint64_t(row_bytes()));
  }

 private:
  LITE_DETR_INLINE uint32_t row_bytes() const { return kRow > 0 ? kRow * sizeof(T) : row_; }

  alignas(64) uint64_t upper_[kGroup];
  alignas(64) uint64_t lower_[kGroup];
  uint32_t row_;
};

// `outside` replaces rows outside the map.
template <typename T>
class CornerRows<T, InPlace> {
 public:
  template <typename A>
  LITE_DETR_INLINE void find(const TokenRows<T>& rows, T* outside, const Group<A>& group) {
    const uint64_t base = reinterpret_cast<uint64_t>(rows.first);
    const uint64_t replacement = reinterpret_cast<uint64_t>(outside);
    const uint64_t stride = uint64_t(rows.stride) * sizeof(T);
    for (int i = 0; i < kGroup; ++i) {
      const uint64_t upper = base + uint64_t(int64_t(group.corner[i])) * stride;
      const uint64_t lower = upper + uint64_t(int64_t(group.pitch[i])) * stride;
      address_[0][i] = group.missing[0][i] ? replacement : upper;
      address_[1][i] = group.missing[1][i] ? replacement : upper + stride;
      address_[2][i] = group.missing[2][i] ? replacement : lower;
      address_[3][i] = group.missing[3][i] ? replacement : lower + stride;
    }
  }

  LITE_DETR_INLINE T* at(int corner, int point) const {
    return reinterpret_cast<T*>(address_[corner][point]);
  }

 private:
  alignas(64) uint64_t address_[4][kGroup];
};

// A sampled block and its slopes with respect to the position inside the cell.
template <typename B>
struct Slopes {
  B sample;
  B along_x;
  B along_y;
};

template <typename B, typename Rows, typename A>
LITE_DETR_INLINE B sample_block(
    const Rows& rows, int64_t channel, const A (*weights)[kGroup], int point) {
  B sum = zero_block<B>();
  for (int corner = 0; corner < 4; ++corner) {
    add_scaled(sum, weights[corner][point], load_block<B>(rows.at(corner, point) + channel));
  }
  return sum;
}

template <typename B, typename Rows, typename A>
LITE_DETR_INLINE Slopes<B> sample_slopes(
    const Rows& rows, int64_t channel, A right, A lower, int point) {
  const B a = load_block<B>(rows.at(0, point) + channel);
  const B b = load_block<B>(rows.at(1, point) + channel);
  const B c = load_block<B>(rows.at(2, point) + channel);
  const B d = load_block<B>(rows.at(3, point) + channel);
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
template <typename B, typename Rows, typename A>
LITE_DETR_INLINE void scatter_block(
    const Rows& rows, int64_t channel, const A (*weights)[kGroup], int point, const B& gradient) {
  for (int corner = 0; corner < 4; ++corner) {
    A* target = rows.at(corner, point) + channel;
    B sum = load_block<B>(target);
    add_scaled(sum, weights[corner][point], gradient);
    store_block(target, sum);
  }
}

}  // namespace lite_detr::cpu::LITE_DETR_ISA
