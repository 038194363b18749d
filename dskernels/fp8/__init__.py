"""Quantising to block-scaled e4m3."""

from dskernels.fp8.api import (
    quantize,
    quantize_both,
    rmsnorm_backward,
    rmsnorm_quantize,
    swiglu_quantize,
    swiglu_quantize_backward,
)

__all__ = [
    "quantize",
    "quantize_both",
    "rmsnorm_backward",
    "rmsnorm_quantize",
    "swiglu_quantize",
    "swiglu_quantize_backward",
]
