"""Multi-scale sampling operators: the one place where models reach native or PyTorch kernels."""

from .key_aware_ms_deform_attn import key_aware_ms_deform_attn
from .ms_deform_attn import ms_deform_attn

__all__ = ["key_aware_ms_deform_attn", "ms_deform_attn"]
