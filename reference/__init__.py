"""Plain PyTorch that defines what each operation means: fp32 arithmetic (fp64 stays fp64), no tricks, any device."""

from dskernels.reference.fp8 import quantize, quantize_both, rmsnorm_quantize, swiglu_quantize
from dskernels.reference.gemm import fp8_gemm, fp8_linear
from dskernels.reference.routing import balance_loss, route, update_bias

__all__ = [
    "balance_loss",
    "fp8_gemm",
    "fp8_linear",
    "quantize",
    "quantize_both",
    "rmsnorm_quantize",
    "route",
    "swiglu_quantize",
    "update_bias",
]
