// What torch_api.h declares, by LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>

#include <array>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// Of Python's own stable ABI. Null in a process without Python.
extern "C" {
extern __attribute__((weak)) void* PyExc_TypeError;
extern __attribute__((weak)) void* PyExc_ValueError;
__attribute__((weak)) void PyErr_SetString(void* type, const char* message);
}

// The stable ABI has no exceptions. PyTorch's bindings make those of the standard library into
// RuntimeError, some versions of them std::invalid_argument into ValueError. All ask this class of
// theirs, which they recognise by its name, for what to raise. If a later version did not, that would
// be a RuntimeError with the same message.
namespace pybind11 {

class __attribute__((visibility("default"))) builtin_exception : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  virtual void set_error() const = 0;
};

}  // namespace pybind11

namespace lite_detr {

using Tensor = torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

class ValueError final : public pybind11::builtin_exception {
 public:
  using pybind11::builtin_exception::builtin_exception;
  void set_error() const override { PyErr_SetString(PyExc_ValueError, what()); }
};

class TypeError final : public pybind11::builtin_exception {
 public:
  using pybind11::builtin_exception::builtin_exception;
  void set_error() const override { PyErr_SetString(PyExc_TypeError, what()); }
};

namespace api {

using torch::stable::get_num_threads;
using torch::stable::parallel_for;

// Calls an operator of PyTorch that returns a tensor.
template <size_t count>
Tensor call(const char* name, const char* overload, std::array<StableIValue, count> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor empty(Sizes sizes, const Tensor& like, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
}

inline Tensor empty_like(const Tensor& tensor) {
  return empty(tensor.sizes(), tensor, tensor.scalar_type());
}

inline Tensor to(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}
inline Tensor to_cpu(const Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  return torch::stable::to(tensor, torch::stable::Device(torch::headeronly::kCPU));
}
inline Tensor contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline Tensor view(const Tensor& tensor, Sizes sizes) { return torch::stable::view(tensor, sizes); }
inline Tensor flatten(const Tensor& tensor, int64_t first) {
  return torch::stable::flatten(tensor, first, -1);
}
inline Tensor unsqueeze(const Tensor& tensor, int64_t dim) {
  return torch::stable::unsqueeze(tensor, dim);
}
inline Tensor narrow(Tensor tensor, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(tensor, dim, start, length);
}

inline Tensor fill(const std::vector<double>& numbers, const Tensor& like) {
  Tensor tensor = empty({int64_t(numbers.size())}, like, like.scalar_type());
  for (size_t i = 0; i < numbers.size(); ++i) {
    Tensor number = torch::stable::select(tensor, 0, i);
    torch::stable::fill_(number, numbers[i]);
  }
  return tensor;
}

inline Tensor pad(const Tensor& tensor, int64_t missing) {
  return torch::stable::pad(tensor, {0, missing});
}

inline Tensor sum(const Tensor& tensor, Sizes dims) { return torch::stable::sum(tensor, dims); }
inline Tensor multiply(const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  return call<2>("aten::mul", "Tensor", {from(a), from(b)});
}
inline Tensor scale(const Tensor& tensor, double factor) {
  return multiply(tensor, fill({factor}, tensor));
}
inline Tensor join(const Tensor& a, const Tensor& b, int64_t dim) {
  using torch::stable::detail::from;
  return call<2>("aten::cat", "", {from(std::vector<Tensor>{a, b}), from(dim)});
}

}  // namespace api

// Writes messages as PyTorch's C++ API does.
class Message {
 public:
  template <typename T>
  Message& operator<<(const T& part) {
    stream_ << part;
    return *this;
  }
  Message& operator<<(const Sizes& sizes) {
    stream_ << '[';
    for (size_t i = 0; i < sizes.size(); ++i) stream_ << (i == 0 ? "" : ", ") << sizes[i];
    stream_ << ']';
    return *this;
  }
  Message& operator<<(const torch::stable::Device& device) {
    using torch::headeronly::DeviceType;
    switch (device.type()) {
      case DeviceType::CPU:
        return *this << "cpu";
      case DeviceType::Meta:
        return *this << "meta";
      case DeviceType::CUDA:
        return *this << "cuda:" << device.index();
      default:
        return *this << "of type " << int(device.type()) << ", number " << device.index();
    }
  }
  std::string text() const { return stream_.str(); }

 private:
  std::ostringstream stream_;
};

template <typename Error, typename... Parts>
[[noreturn]] __attribute__((noinline, cold)) void raise(const Parts&... parts) {
  Message message;
  (message << ... << parts);
  throw Error(message.text());
}

}  // namespace lite_detr

#define LITE_DETR_CHECK_VALUE(condition, ...) \
  if (!(condition)) ::lite_detr::raise<::lite_detr::ValueError>(__VA_ARGS__)
#define LITE_DETR_CHECK_TYPE(condition, ...) \
  if (!(condition)) ::lite_detr::raise<::lite_detr::TypeError>(__VA_ARGS__)
#define LITE_DETR_LIBRARY(library) STABLE_TORCH_LIBRARY(lite_detr, library)
#define LITE_DETR_LIBRARY_IMPL(key, library) STABLE_TORCH_LIBRARY_IMPL(lite_detr, key, library)
#define LITE_DETR_KERNEL(function) TORCH_BOX(&function)
