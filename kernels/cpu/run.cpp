#include "run.h"

#include <cstdlib>
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

ThreadMemory& thread_memory() {
  static thread_local ThreadMemory memory;
  return memory;
}

PointLevels::PointLevels(const Geometry& geometry, const RowLayout& layout) {
  const int64_t count = geometry.points_in_all();
  // A group may begin at any level.
  for (auto* of_points : {&level_, &width_, &height_, &first_, &pitch_}) {
    of_points->resize(count + kGroup);
  }
  for (int64_t point = 0; point < count; ++point) {
    const int64_t level = point / geometry.points;
    level_[point] = level;
    width_[point] = geometry.levels[level].width;
    height_[point] = geometry.levels[level].height;
    first_[point] = layout.first[level];
    pitch_[point] = layout.pitch[level];
  }
}

KernelGeometry PointLevels::for_kernel(const Geometry& geometry, const RowLayout& layout) const {
  return {
      geometry.queries,
      geometry.heads,
      padded_channels(geometry.channels),
      geometry.points_in_all(),
      int64_t(geometry.levels.size()),
      layout.bordered,
      level_.data(),
      width_.data(),
      height_.data(),
      first_.data(),
      pitch_.data()};
}

// It takes no tensor that would name a device.
LITE_DETR_LIBRARY_IMPL(CompositeExplicitAutograd, library) {
  library.impl("cpu_capability", LITE_DETR_KERNEL(cpu_capability));
}

}  // namespace lite_detr::cpu
