// Where a query's points lie, and the rows that are read for them: of tokens, and of the query.
#pragma once

#include "bilinear.cuh"
#include "lanes.cuh"
#include "vectors.cuh"

namespace lite_detr::cuda {

// A location on a level, in the few registers that the lanes of a group pass around.
template <typename A>
struct Point {
  int32_t token;   // of the top left corner
  uint32_t flags;  // bits 0 to 3: which corners exist; from bit 4 on: the level
  A right;
  A lower;

  __device__ __forceinline__ bool has(int corner) const { return flags >> corner & 1; }
  __device__ __forceinline__ int32_t level() const { return flags >> 4; }

  // The token of a corner that exists; `width` is of the level.
  __device__ __forceinline__ int32_t corner_token(int corner, int32_t width) const {
    return token + (corner & 1) + (corner >> 1) * width;
  }
};

// The points of an item.
struct PointRange {
  int32_t item;   // of B * Q * M
  int64_t first;  // of B * Q * M * L * P

  __device__ __forceinline__ PointRange(int32_t item, int32_t points)
      : item(item), first(int64_t(item) * points) {}

  // Of B * Q: a division instead of a register that would be taken all the time.
  __device__ __forceinline__ int32_t query(const KernelGeometry& geometry) const {
    return uint32_t(item) / uint32_t(geometry.heads);
  }
};

// Where a point lies, in cells of its level.
template <typename A>
struct Position {
  A column;
  A row;
};

template <typename T>
__device__ __forceinline__ Position<compute_t<T>> find_position(
    const KernelGeometry& geometry, const Locations<T>& points, const PointRange& range,
    int32_t point, int32_t level) {
  const auto location = load_pair(points.locations + 2 * range.first, point);
  return {
      to_cells(location.x, geometry.width[level]), to_cells(location.y, geometry.height[level])};
}

// The extent of a box in units of its points' offsets, in cells; one cell for reference points.
template <typename T>
__device__ __forceinline__ Position<compute_t<T>> offset_units(
    const KernelGeometry& geometry, const Offsets<T>& points, const PointRange& range,
    int32_t level) {
  using A = compute_t<T>;
  if (points.coordinates == 2) return {A(1), A(1)};
  const A* boxes = points.references + int64_t(range.query(geometry)) * geometry.levels * 4;
  const auto extent = load_pair(boxes, 2 * level + 1);
  return {
      extent.x * points.step * A(geometry.width[level]),
      extent.y * points.step * A(geometry.height[level])};
}

template <typename T>
__device__ __forceinline__ Position<compute_t<T>> find_position(
    const KernelGeometry& geometry, const Offsets<T>& points, const PointRange& range,
    int32_t point, int32_t level) {
  using A = compute_t<T>;
  const A* references =
      points.references + int64_t(range.query(geometry)) * geometry.levels * points.coordinates;
  const auto reference = load_pair(references, points.coordinates == 2 ? level : 2 * level);
  const auto offset = load_pair(points.offsets + 2 * range.first, point);
  const Position<A> units = offset_units(geometry, points, range, level);
  return {
      to_cells(reference.x, geometry.width[level]) + offset.x * units.column,
      to_cells(reference.y, geometry.height[level]) + offset.y * units.row};
}

// The corners of one of a query's L * P points.
template <typename Points, typename A = typename Points::Exact>
__device__ __forceinline__ Corners<A> corners_of(
    const KernelGeometry& geometry, const Points& points, const PointRange& range, int32_t point,
    int32_t level) {
  const Position<A> position = find_position(geometry, points, range, point, level);
  return find_corners(
      position.column, position.row, geometry.width[level], geometry.height[level],
      geometry.start[level]);
}

__device__ __forceinline__ int32_t level_of(const KernelGeometry& geometry, int32_t point) {
  return uint32_t(point) / uint32_t(geometry.points);
}

// One of a query's L * P points. Points beyond the last one have no corners.
template <typename Points, typename A = typename Points::Exact>
__device__ __forceinline__ Point<A> find_point(
    const KernelGeometry& geometry, const Points& points, const PointRange& range, int32_t point) {
  if (point >= geometry.levels * geometry.points) return {0, 0, A(0), A(0)};
  const int32_t level = level_of(geometry, point);
  const Corners<A> corners = corners_of(geometry, points, range, point, level);
  uint32_t flags = uint32_t(level) << 4;
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    flags |= uint32_t(corners.token[corner] >= 0) << corner;
  }
  return {corners.first, flags, corners.right, corners.lower};
}

// Stores the gradient of where a point lies, from that of its position in cells.
template <typename T, typename A>
__device__ __forceinline__ void store_grad_point(
    const KernelGeometry& geometry, const Locations<T>& points, const PointRange& range,
    int32_t point, int32_t level, A along_x, A along_y) {
  store_pair(
      points.gradient + 2 * range.first, point, along_x * A(geometry.width[level]),
      along_y * A(geometry.height[level]));
}

template <typename T, typename A>
__device__ __forceinline__ void store_grad_point(
    const KernelGeometry& geometry, const Offsets<T>& points, const PointRange& range,
    int32_t point, int32_t level, A along_x, A along_y) {
  // Scaling it for offsets from boxes would take registers that the loops around this lack: it is
  // a pass of its own.
  store_pair(points.grad_positions + 2 * range.first, point, along_x, along_y);
}

template <int kLanes, typename A>
__device__ __forceinline__ Point<A> share(const Point<A>& point, int lane) {
  return {
      share<kLanes>(point.token, lane), share<kLanes>(point.flags, lane),
      share<kLanes>(point.right, lane), share<kLanes>(point.lower, lane)};
}

// A corner's influence on a bilinear mix: its share, and how that changes with a step of one cell
// to the right, or down.
template <typename A>
struct Influence {
  A share;
  A along_x;
  A along_y;

  __device__ __forceinline__ Influence(const Point<A>& point, int corner)
      : Influence(point.right, point.lower, corner) {}

  __device__ __forceinline__ Influence(A right, A lower, int corner) {
    const A of_column = corner & 1 ? right : A(1) - right;
    const A of_row = corner >> 1 ? lower : A(1) - lower;
    share = of_column * of_row;
    along_x = corner & 1 ? of_row : -of_row;
    along_y = corner >> 1 ? of_column : -of_column;
  }
};

// A point as all lanes of a group read it: the rows of the tokens around it, and what each of them
// counts. A row is a token's number times a step that the reader knows.
//
// A corner that is not on the map repeats another one, and counts nothing. A point without corners
// has rows of -1.
template <typename A>
struct alignas(16) Sample {
  int32_t rows[4];
  A shares[4];

  __device__ __forceinline__ bool exists() const { return rows[0] >= 0; }
};

// One of a query's L * P points, each of whose shares is times `weight_of` the point; `step` is that
// of its rows. Points beyond the last one have no corners.
template <typename Points, typename Weight, typename A = typename Points::Exact>
__device__ __forceinline__ Sample<A> find_sample(
    const KernelGeometry& geometry, const Points& points, const PointRange& range, int32_t point,
    int32_t step, Weight weight_of) {
  Sample<A> sample{{-1, -1, -1, -1}, {}};
  if (point >= geometry.levels * geometry.points) return sample;
  const Corners<A> corners =
      corners_of(geometry, points, range, point, level_of(geometry, point));
  const A weight = weight_of(point);
  const int32_t any =
      max(max(corners.token[0], corners.token[1]), max(corners.token[2], corners.token[3]));
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    const bool exists = corners.token[corner] >= 0;
    const A share = Influence<A>(corners.right, corners.lower, corner).share;
    sample.rows[corner] = any < 0 ? -1 : (exists ? corners.token[corner] : any) * step;
    sample.shares[corner] = exists ? weight * share : A(0);
  }
  return sample;
}

// The points that the lanes of a group have found, in shared memory.
template <typename A, int kLanes, int kThreads>
class GroupSamples {
 public:
  // Groups are a sample more apart than they have lanes, so that they read from different banks.
  __device__ __forceinline__ explicit GroupSamples(int32_t lane)
      : samples_(
            shared_array<Sample<A>, kThreads + kThreads / kLanes>() +
            threadIdx.x / kLanes * (kLanes + 1)),
        lane_(lane) {}

  // Every lane puts its own, and gets whether all samples of the warp exist.
  __device__ __forceinline__ bool put(const Sample<A>& own) {
    __syncwarp();
    samples_[lane_] = own;
    __syncwarp();
    return __all_sync(kWholeWarp, own.exists());
  }

  __device__ __forceinline__ const Sample<A>& operator[](int lane) const { return samples_[lane]; }

 private:
  Sample<A>* samples_;
  int32_t lane_;
};

// The bilinear mix of one number for each corner, and its slopes.
template <typename A>
struct Mix {
  A value = 0;
  A along_x = 0;
  A along_y = 0;

  __device__ __forceinline__ void add(const Influence<A>& influence, A number) {
    value += influence.share * number;
    along_x += influence.along_x * number;
    along_y += influence.along_y * number;
  }
};

// Reads a lane's channels of the token rows of one head and image.
template <typename T, int kWidth, int kLanes>
class TokenReader {
 public:
  using Part = Channels<compute_t<T>, kWidth>;

  __device__ __forceinline__ TokenReader(const TokenRows<const T>& rows, int32_t lane)
      : first_(pin(reinterpret_cast<const char*>(first_row(rows) + lane * kWidth))),
        stride_(rows.token_stride) {}

  // What a token's number is multiplied by for row(): its address is then one instruction more, as
  // the other factor is a constant.
  __device__ __forceinline__ int32_t step() const { return stride_ / kVectorBytes; }

  // A row by its Sample. Unless kExists, it may be -1, which is a row of zeros.
  template <bool kExists>
  __device__ __forceinline__ Part row(int32_t row, int vector) const {
    if (!kExists && row < 0) return {};
    return part(first_ + int64_t(row) * kVectorBytes, vector);
  }

  // The row of a token, or of -1 as above.
  template <bool kExists>
  __device__ __forceinline__ Part row_of_token(int32_t token, int vector) const {
    if (!kExists && token < 0) return {};
    return part(first_ + int64_t(token) * stride_, vector);
  }

  // The row at a corner of a point; zeros if there is none.
  template <typename A>
  __device__ __forceinline__ Part at(
      const Point<A>& point, int corner, int32_t width, int vector) const {
    if (!point.has(corner)) return {};
    return row_of_token<true>(point.corner_token(corner, width), vector);
  }

 private:
  __device__ __forceinline__ static Part part(const char* row, int vector) {
    return load<kWidth>(reinterpret_cast<const T*>(row) + vector * kLanes * kWidth);
  }

  const char* first_;
  int32_t stride_;
};

// A lane's channels of a row that belongs to a query: the query itself, its output or a gradient.
//
// One vector stays in registers. More would leave too few for the sums: they are loaded from a cache
// when they are used.
template <typename T, int kWidth, int kLanes, int kVectors>
class QueryRow {
 public:
  using Part = Channels<compute_t<T>, kWidth>;
  static constexpr bool kHeld = kVectors == 1;

  __device__ __forceinline__ QueryRow(const T* rows, int32_t item, int32_t lane)
      : rows_(rows), item_(item), channel_(lane * kWidth) {
    if constexpr (kHeld) held_ = load_vector(0);
  }

  __device__ __forceinline__ Part at(int vector) const {
    if constexpr (kHeld) {
      return held_;
    } else {
      return load_vector(vector);
    }
  }

 private:
  __device__ __forceinline__ Part load_vector(int vector) const {
    const T* row = rows_ + int64_t(pin(item_)) * (kLanes * kWidth * kVectors) + channel_;
    return load<kWidth>(row + vector * kLanes * kWidth);
  }

  const T* rows_;
  int32_t item_;
  int32_t channel_;
  Part held_;
};

// The product of two rows of a query, for all lanes: of the output and its gradient, it is the mean
// of the weights' gradients, which a softmax's Jacobian subtracts.
template <typename T, int kWidth, int kLanes, int kVectors>
__device__ __forceinline__ compute_t<T> row_product(
    const QueryRow<T, kWidth, kLanes, kVectors>& left, const T* rows, int32_t item, int32_t lane) {
  const QueryRow<T, kWidth, kLanes, kVectors> right(rows, item, lane);
  compute_t<T> sum = 0;
#pragma unroll
  for (int vector = 0; vector < kVectors; ++vector) sum += dot(left.at(vector), right.at(vector));
  return sum_lanes<kLanes>(sum);
}

}  // namespace lite_detr::cuda
