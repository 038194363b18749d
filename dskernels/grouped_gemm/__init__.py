"""Grouped matrix products: one per expert over a ragged batch, the group sizes known to the device alone."""

from dskernels.grouped_gemm.api import grouped_gemm, grouped_gemm_masked, grouped_wgrad, quantize_grouped

__all__ = ["grouped_gemm", "grouped_gemm_masked", "grouped_wgrad", "quantize_grouped"]
