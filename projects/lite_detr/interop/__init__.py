"""Our parts in models of other projects, with or without Detectron2.

:func:`use_native_attention` speeds up a model that is there; the modules and functions take the
place of those that its code imports; the encoder and the attention serve models of your own.
"""

from . import extension
from .encoder import InterleavedEncoder
from .levels import flatten_maps, split_tokens
from .modules import (
    DetrexDeformableAttention,
    KeyAwareDeformableAttention,
    MMCVDeformableAttention,
    MSDeformAttn,
)
from .native_attention import NativeAttention, Replacement, use_native_attention
from .sampling import (
    MSDeformAttnFunction,
    MultiScaleDeformableAttnFunction,
    MultiScaleDeformableAttnFunction_fp16,
    MultiScaleDeformableAttnFunction_fp32,
    ms_deform_attn_core_pytorch,
    multi_scale_deformable_attention,
    multi_scale_deformable_attention_v2,
    multi_scale_deformable_attn_pytorch,
)

__all__ = [
    "DetrexDeformableAttention",
    "InterleavedEncoder",
    "KeyAwareDeformableAttention",
    "MMCVDeformableAttention",
    "MSDeformAttn",
    "MSDeformAttnFunction",
    "MultiScaleDeformableAttnFunction",
    "MultiScaleDeformableAttnFunction_fp16",
    "MultiScaleDeformableAttnFunction_fp32",
    "NativeAttention",
    "Replacement",
    "extension",
    "flatten_maps",
    "ms_deform_attn_core_pytorch",
    "multi_scale_deformable_attention",
    "multi_scale_deformable_attention_v2",
    "multi_scale_deformable_attn_pytorch",
    "split_tokens",
    "use_native_attention",
]
