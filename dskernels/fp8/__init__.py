"""Quantising to block-scaled e4m3."""

from dskernels.fp8.api import quantize, quantize_both, rmsnorm_quantize, swiglu_quantize

__all__ = ["quantize", "quantize_both", "rmsnorm_quantize", "swiglu_quantize"]
