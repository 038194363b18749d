"""Matrix products of block-scaled e4m3 matrices."""

from dskernels.gemm.api import fp8_gemm, fp8_linear

__all__ = ["fp8_gemm", "fp8_linear"]
