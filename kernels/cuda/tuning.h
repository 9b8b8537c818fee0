// How a kernel is laid out over a GPU's threads, by the width of a head and the type of numbers.
//
// The choices follow from the sizes and latencies given beside them, and from what the compiler
// makes of them (tools/kernels/report.py), not from measured times: no GPU was available.
#pragma once

#include "kernels.h"

namespace lite_detr::cuda {

// A group of lanes works for one query and one head, each lane for a few of its channels.
struct Layout {
  int width;    // channels that a lane loads at once
  int lanes;    // of a group: 4, 8, 16 or 32
  int vectors;  // loads of a lane for a row of the head
  int batch;    // points that are unrolled
  int corners;  // corners of a point that are unrolled
  int threads;  // of a block
};

// Lanes: as many as load a row of the head at once. A row of 32 float32 channels is a line of 128
// bytes, and takes eight lanes. At least four, as the lanes of a group also share the work of
// finding its points. At most a warp, whose lanes then load several times.
constexpr Layout spread(int head_width, int width, int batch, int corners, int threads) {
  Layout layout{width, 4, 1, batch, corners, threads};
  while (layout.lanes < 32 && layout.lanes * width < head_width) layout.lanes *= 2;
  while (layout.lanes * width * layout.vectors < head_width) layout.vectors *= 2;
  // Sums of several vectors leave registers for half a point at a time.
  if (layout.vectors > 1) {
    layout.batch = 1;
    layout.corners = corners > 2 ? 2 : 1;
  }
  return layout;
}

// Threads. Warps of a block neither wait for each other nor exchange anything, so its size only
// decides which queries share an L1 cache (those of a block are consecutive, of one head), and how
// finely a small call is spread. Forward takes 256, so that the 32 queries of a block in float32
// share many rows. Backward is limited by its additions and not by what it reads; it takes 128, and
// is spread twice as finely.
constexpr int kForwardThreads = 256;
constexpr int kBackwardThreads = 128;
// A grid of less than two blocks for each of the 132 multiprocessors of an H100 takes small blocks:
// a decoder's 900 queries of 8 heads are 232 blocks of 256 threads in float32, and 120 in 16 bits.
constexpr int kBlocksOfASmallGrid = 2 * 132;
constexpr int kSmallBlock = 64;
// Half of the threads that a multiprocessor can hold, which leaves 64 to 128 registers for each.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
constexpr int kHalf = 512;
#elif defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ == 1200)
constexpr int kHalf = 768;
#else
constexpr int kHalf = 1024;
#endif

template <typename T>
constexpr bool kIs16Bit = sizeof(T) == 2;
template <typename T>
constexpr bool kIs64Bit = sizeof(T) == 8;

// float64 is there to check gradients: no more than a block of a forward pass, whose threads have as
// many registers as they need.
template <typename T>
constexpr int kResidentThreads = kIs64Bit<T> ? kForwardThreads : kHalf;

// Width, forward: 16 bytes, the most that a load takes, unless that leaves lanes without channels.
template <typename T, int kHeadWidth>
constexpr int kForwardWidth =
    kHeadWidth < 4 * kChannelMultiple<T> ? kHeadWidth / 4 : kChannelMultiple<T>;
// Backward: four numbers, even of 16 bits. Their gradients add up in float32, of which four are the
// widest atomic addition, and a lane should add to the channels that it has loaded. A single 64-bit
// number, which neighbouring lanes add beside each other.
template <typename T>
constexpr int kBackwardWidth = kIs64Bit<T> ? 1 : 4;

// Batch and corners. Unrolled loads are in flight together: four loads of 16 bytes for a point.
// With 1024 threads these are 64 KiB, which hides a latency of 500 cycles at the 128 bytes a cycle
// of an L1 cache; two points hide twice as much. A load takes four registers and a lane's sums as
// many, or eight for 16-bit numbers; these are the largest batches that fit 64 registers without
// spilling. With separate keys fewer corners of a point are in flight, down to one.
template <typename T, int kHeadWidth>
constexpr Layout kMsdaForward = spread(
    kHeadWidth, kForwardWidth<T, kHeadWidth>, kIs16Bit<T> ? 1 : 2, 4,
    kForwardThreads);

template <typename T, int kHeadWidth>
constexpr Layout kMsdaBackward = spread(
    kHeadWidth, kBackwardWidth<T>, 2, 4, kBackwardThreads);

template <typename T, int kHeadWidth, bool kShared>
constexpr Layout kKeyAwareForward = spread(
    kHeadWidth, kForwardWidth<T, kHeadWidth>, kShared && !kIs16Bit<T> ? 2 : 1, kShared ? 4 : 2,
    kForwardThreads);

template <typename T, int kHeadWidth, bool kShared>
constexpr Layout kKeyAwareBackward = spread(
    kHeadWidth, kBackwardWidth<T>, 1, kShared ? 4 : 1, kBackwardThreads);

}  // namespace lite_detr::cuda
