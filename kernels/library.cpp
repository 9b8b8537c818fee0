// The operators' schemas. Their kernels are registered where they are: autograd.cpp, autocast.cpp and
// the folders of the devices; what a tracer needs is in lite_detr/ops/native.py.
#include <torch/library.h>

TORCH_LIBRARY(lite_detr, library) {
  library.def(
      "ms_deform_attn(Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
      "Tensor sampling_locations, Tensor attention_weights) -> Tensor");
  library.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, "
      "Tensor level_start_index, Tensor sampling_locations, Tensor attention_weights) -> "
      "(Tensor grad_value, Tensor grad_locations, Tensor grad_weights)");
  // A key of None stands for the values. The second result is the logsumexp of the logits.
  library.def(
      "key_aware_ms_deform_attn(Tensor query, Tensor? key, Tensor value, Tensor spatial_shapes, "
      "Tensor level_start_index, Tensor sampling_locations) -> (Tensor output, Tensor logsumexp)");
  // The gradient of a key of None is an empty tensor, and part of that of the values.
  library.def(
      "key_aware_ms_deform_attn_backward(Tensor grad_output, Tensor query, Tensor? key, "
      "Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations, "
      "Tensor output, Tensor logsumexp) -> "
      "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_locations)");
  // The instruction set that the CPU kernels run with: portable, avx2 or avx512.
  library.def("cpu_capability() -> str");
  // The GPUs that the CUDA kernels are compiled for: 800,900 is 8.0 and 9.0.
  library.def("cuda_architectures() -> str");
}
