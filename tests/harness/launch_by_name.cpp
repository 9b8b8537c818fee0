// Launches a kernel as CUDA's driver does: given the address of its argument, as another language
// has packed it.
#include <exception>
#include <string>

#include "../../kernels/cuda/kernels.h"

namespace lite_detr::cuda {

namespace {

using Launch = cudaError_t (*)(const void* argument);

template <typename Argument>
Launch launcher() {
  return [](const void* argument) {
    return launch(*static_cast<const Argument*>(argument), nullptr);
  };
}

template <typename T, typename Points>
Launch find(const std::string& kernel) {
  if (kernel == "msda_forward") return launcher<MsdaForward<T, Points>>();
  if (kernel == "msda_backward") return launcher<MsdaBackward<T, Points>>();
  if (kernel == "key_aware_forward") return launcher<KeyAwareForward<T, Points>>();
  if (kernel == "key_aware_backward") return launcher<KeyAwareBackward<T, Points>>();
  return nullptr;
}

template <typename T>
Launch find(const std::string& kernel, const std::string& points) {
  return points == "Offsets" ? find<T, Offsets<T>>(kernel) : find<T, Locations<T>>(kernel);
}

Launch find(const std::string& kernel, const std::string& type, const std::string& points) {
  if (type == "float") return find<float>(kernel, points);
  if (type == "double") return find<double>(kernel, points);
  if (type == "Float16") return find<Float16>(kernel, points);
  if (type == "BFloat16") return find<BFloat16>(kernel, points);
  return nullptr;
}

}  // namespace

// Returns an empty string, or what went wrong.
extern "C" const char* lite_detr_harness_launch(
    const char* kernel, const char* type, const char* points, const void* argument) {
  static std::string problem;
  try {
    const Launch launch = find(kernel, type, points);
    if (launch == nullptr) return "no kernel has this name";
    const cudaError_t error = launch(argument);
    problem = error == cudaSuccess ? "" : cudaGetErrorString(error);
  } catch (const std::exception& exception) {
    problem = exception.what();
  }
  return problem.c_str();
}

}  // namespace lite_detr::cuda
