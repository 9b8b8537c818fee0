#include "run.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <string>

namespace lite_detr::cpu {

namespace {

const AllKernels& choose_kernels() {
  const char* variable = std::getenv("LITE_DETR_CPU_CAPABILITY");
  const std::string wanted = variable == nullptr ? "" : variable;
  LITE_DETR_CHECK_VALUE(
      wanted.empty() || wanted == "portable" || wanted == "avx2" || wanted == "avx512",
      "LITE_DETR_CPU_CAPABILITY must be portable, avx2 or avx512, got ", wanted,
      ": unset it to let the processor decide");
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (wanted.empty() || wanted == "avx512")) return avx512_kernels;
  if (has_avx2 && (wanted.empty() || wanted != "portable")) return avx2_kernels;
#endif
  return portable_kernels;
}

std::string cpu_capability() { return kernels().name; }

}  // namespace

const AllKernels& kernels() {
  static const AllKernels& chosen = choose_kernels();
  return chosen;
}

void* allocate(size_t bytes) {
  constexpr size_t kLine = 64;
  void* memory = std::aligned_alloc(kLine, round_up(std::max(bytes, kLine), kLine));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

ThreadMemory& thread_memory() {
  static thread_local ThreadMemory memory;
  return memory;
}

PointLevels::PointLevels(const Geometry& geometry) {
  const int64_t count = geometry.points_in_all();
  const int64_t padded = round_up(count, kGroup);
  level_.resize(padded);
  width_.resize(padded);
  height_.resize(padded);
  start_.resize(padded);
  for (int64_t point = 0; point < count; ++point) {
    level_[point] = point / geometry.points;
    const Level& level = geometry.levels[level_[point]];
    width_[point] = level.width;
    height_[point] = level.height;
    start_[point] = level.start;
  }
}

KernelGeometry PointLevels::for_kernel(const Geometry& geometry) const {
  return {
      geometry.tokens,
      geometry.queries,
      geometry.heads,
      padded_channels(geometry.channels),
      geometry.points_in_all(),
      int64_t(geometry.levels.size()),
      level_.data(),
      width_.data(),
      height_.data(),
      start_.data()};
}

// It takes no tensor that would name a device.
LITE_DETR_LIBRARY_IMPL(CompositeExplicitAutograd, library) {
  library.impl("cpu_capability", LITE_DETR_KERNEL(cpu_capability));
}

}  // namespace lite_detr::cpu
