"""Sampling operators: native if the extension was built, otherwise in PyTorch."""

from .key_aware_ms_deform_attn import (
    fused_key_aware_ms_deform_attn,
    fused_key_aware_ms_deform_attn_pytorch,
    key_aware_ms_deform_attn,
    key_aware_ms_deform_attn_pytorch,
    key_aware_weights,
)
from .ms_deform_attn import (
    fused_ms_deform_attn,
    fused_ms_deform_attn_pytorch,
    ms_deform_attn,
    ms_deform_attn_pytorch,
)
from .native import backend

__all__ = [
    "backend",
    "fused_key_aware_ms_deform_attn",
    "fused_key_aware_ms_deform_attn_pytorch",
    "fused_ms_deform_attn",
    "fused_ms_deform_attn_pytorch",
    "key_aware_ms_deform_attn",
    "key_aware_ms_deform_attn_pytorch",
    "key_aware_weights",
    "ms_deform_attn",
    "ms_deform_attn_pytorch",
]
