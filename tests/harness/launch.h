// Runs a kernel: every thread of every block.
#pragma once

#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "counters.h"
#include "schedule.h"
#include "shim/cuda_runtime_api.h"

namespace lite_detr::harness {

// A wrong grid is returned as an error, as in CUDA; a thread's mistake is thrown.
cudaError_t launch(
    dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// Sets the schedule of all launches from now on.
void set_schedule(const Schedule& schedule);

// Returns the launches that have ended since the last call.
struct Launch {
  dim3 grid;
  dim3 block;
  Counters counters;
};
std::vector<Launch> take_launches();

// Binds a kernel to its arguments; each thread gets copies of them, as in CUDA.
template <typename... Parameters>
std::function<void()> bind_arguments(void (*kernel)(Parameters...), void** arguments) {
  return [=]() {
    [&]<size_t... kIndices>(std::index_sequence<kIndices...>) {
      kernel(*static_cast<std::remove_cv_t<Parameters>*>(arguments[kIndices])...);
    }(std::index_sequence_for<Parameters...>());
  };
}

}  // namespace lite_detr::harness
