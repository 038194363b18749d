"""Parity cases of the e4m3 matrix products."""

from __future__ import annotations

import torch

from dskernels.parity import E4M3_SUMS, Case
from dskernels.parity.inputs import normal, quantized

# Rounded to bf16: half an ulp is 2^-9, and half its square 2e-6.
BF16 = 5e-6


def _product(m: int, n: int, k: int, b_rows: int = 128, **options):
    def inputs(device: torch.device) -> tuple[tuple, dict]:
        kwargs = {name: value(device) if callable(value) else value for name, value in options.items()}
        return (quantized(0, m, k, (1, 128), device), quantized(1, n, k, (b_rows, 128), device)), kwargs

    return inputs


CASES = [
    Case("fp8_gemm", "1x256x512", _product(1, 256, 512), BF16),
    Case("fp8_gemm", "83x576x300, bias", _product(83, 576, 300, bias=lambda device: normal(2, 576).to(device)), BF16),
    Case("fp8_gemm", "70x130x260, tokens, fp32", _product(70, 130, 260, b_rows=1, out_dtype=torch.float32), E4M3_SUMS),
    Case(
        "fp8_gemm",
        "70x130x260, accumulate",
        _product(70, 130, 260, out=lambda device: normal(3, 70, 130).to(device), accumulate=True),
        E4M3_SUMS,
    ),
    Case(
        "fp8_linear",
        "40x192x160, gradients",
        lambda device: ((normal(4, 40, 192).to(device), normal(5, 160, 192).to(device), normal(6, 160).to(device)), {}),
        E4M3_SUMS,
        gradient=True,
    ),
]
