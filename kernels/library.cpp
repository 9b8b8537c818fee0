// The operators' schemas. Their kernels register themselves in the folders of the devices;
// lite_detr/ops/native.py registers derivatives and what tracers need.
#include "torch_api.h"

LITE_DETR_LIBRARY(library) {
  library.def(
      "ms_deform_attn(Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
      "Tensor sampling_locations, Tensor attention_weights) -> Tensor");
  library.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, "
      "Tensor level_start_index, Tensor sampling_locations, Tensor attention_weights) -> "
      "(Tensor grad_value, Tensor grad_locations, Tensor grad_weights)");
  // If the key is None, the values are the keys. The second result is the logsumexp of the logits.
  library.def(
      "key_aware_ms_deform_attn(Tensor query, Tensor? key, Tensor value, Tensor spatial_shapes, "
      "Tensor level_start_index, Tensor sampling_locations) -> (Tensor output, Tensor logsumexp)");
  // If the key is None, its gradient is part of the values', and grad_key is empty.
  library.def(
      "key_aware_ms_deform_attn_backward(Tensor grad_output, Tensor query, Tensor? key, "
      "Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations, "
      "Tensor output, Tensor logsumexp) -> "
      "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_locations)");
  // The fused operators compute locations and the softmax themselves. `sizes` are the heights and
  // widths of the levels in turn. Gradients of reference points are empty unless asked for.
  library.def(
      "fused_ms_deform_attn(Tensor value, SymInt[] sizes, Tensor reference_points, "
      "Tensor sampling_offsets, Tensor attention_logits) -> Tensor");
  library.def(
      "fused_ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] sizes, "
      "Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, Tensor output, "
      "bool with_references) -> "
      "(Tensor grad_value, Tensor grad_references, Tensor grad_offsets, Tensor grad_logits)");
  library.def(
      "fused_key_aware_ms_deform_attn(Tensor query, Tensor? key, Tensor value, SymInt[] sizes, "
      "Tensor reference_points, Tensor sampling_offsets) -> (Tensor output, Tensor logsumexp)");
  library.def(
      "fused_key_aware_ms_deform_attn_backward(Tensor grad_output, Tensor query, Tensor? key, "
      "Tensor value, SymInt[] sizes, Tensor reference_points, Tensor sampling_offsets, "
      "Tensor output, Tensor logsumexp, bool with_references) -> (Tensor grad_query, "
      "Tensor grad_key, Tensor grad_value, Tensor grad_references, Tensor grad_offsets)");
  // The instruction set that the CPU kernels use: portable, avx2 or avx512.
  library.def("cpu_capability() -> str");
  // The GPUs that the CUDA kernels were compiled for, and those that they have PTX of: 800,900/900
  // is 8.0 and 9.0, with PTX of 9.0.
  library.def("cuda_architectures() -> str");
}
