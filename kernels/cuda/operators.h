// The operators on CUDA tensors: of the types of those that pass the dispatcher.
#pragma once

#include "../operators.h"

namespace lite_detr::cuda {

decltype(lite_detr::ms_deform_attn) ms_deform_attn;
decltype(lite_detr::ms_deform_attn_backward) ms_deform_attn_backward;
decltype(lite_detr::key_aware_ms_deform_attn) key_aware_ms_deform_attn;
decltype(lite_detr::key_aware_ms_deform_attn_backward) key_aware_ms_deform_attn_backward;

}  // namespace lite_detr::cuda
