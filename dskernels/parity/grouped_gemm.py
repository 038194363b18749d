"""Parity cases of the grouped products: ragged and empty groups, rows that belong to none."""

from __future__ import annotations

import torch
from torch import Tensor

from dskernels.parity import E4M3_SUMS, Case
from dskernels.parity.inputs import normal, quantized, spread
from dskernels.reference.fp8 import quantize
from dskernels.reference.grouped_gemm import quantize_grouped
from dskernels.types import Fp8Tensor

# fp32 sums in another order, rounded to bf16: half an ulp is 2^-9, and half its square 2e-6.
BF16 = 5e-6
FP32 = 1e-10
EXACT = 0.0

# Four groups: the second is empty, the last begins after 70 rows; two rows belong to none.
OFFSETS = [0, 37, 37, 69, 70]
ROWS = 72


def _offsets(device: torch.device) -> Tensor:
    return torch.tensor(OFFSETS, dtype=torch.int32, device=device)


def _fp8(operand: Fp8Tensor, device: torch.device) -> Fp8Tensor:
    return operand.to(device)


def _weights(n: int, k: int) -> Fp8Tensor:
    return quantize(torch.stack([spread(10 + e, n, k) for e in range(len(OFFSETS) - 1)]), (128, 128))


def _ragged(n: int, k: int, dtype: torch.dtype | None, **options):
    """Operands of `dtype`, or e4m3; rows that belong to no group are NaN."""

    def inputs(device: torch.device) -> tuple[tuple, dict]:
        if dtype is None:
            a: Tensor | Fp8Tensor = quantized(0, ROWS, k, (1, 128), device)
            b: Tensor | Fp8Tensor = _fp8(_weights(n, k), device)
        else:
            a = normal(0, ROWS, k, dtype=dtype)
            a[OFFSETS[-1] :] = float("nan")
            a, b = a.to(device), normal(1, len(OFFSETS) - 1, n, k, dtype=dtype).to(device)
        return (a, b, _offsets(device)), options

    return inputs


def _masked(device: torch.device) -> tuple[tuple, dict]:
    a = quantized(0, 4 * 24, 200, (1, 128), device)
    a = Fp8Tensor(a.data.view(4, 24, 200), a.scale.view(4, 24, 2))
    counts = torch.tensor([24, 0, 5, 17], dtype=torch.int32, device=device)
    # Rows beyond the counts are unspecified: they start as zeros, which is what the reference writes there.
    return (a, _fp8(_weights(130, 200), device), counts), {"out": torch.zeros(4, 24, 130, device=device)}


def _tokens(dtype: torch.dtype | None, **options):
    def operand(x: Tensor, device: torch.device) -> Tensor | Fp8Tensor:
        if dtype is not None:
            return x.to(device, dtype)
        return _fp8(quantize_grouped(x, _offsets(torch.device("cpu"))), device)

    def inputs(device: torch.device) -> tuple[tuple, dict]:
        operands = (operand(spread(2, ROWS, 130), device), operand(spread(3, ROWS, 65), device))
        kwargs = {"out": normal(4, 4, 130, 65).to(device), "accumulate": True} if options.get("accumulate") else {}
        return (*operands, _offsets(device)), kwargs

    return inputs


def _quantize(scale_format: str):
    def inputs(device: torch.device) -> tuple[tuple, dict]:
        return (spread(5, ROWS, 200).to(device), _offsets(device)), {"scale_format": scale_format}

    return inputs


CASES = [
    Case("grouped_gemm", "72 rows, 4x576x300, e4m3", _ragged(576, 300, None), BF16),
    Case("grouped_gemm", "72 rows, 4x130x200, bf16", _ragged(130, 200, torch.bfloat16), BF16),
    Case("grouped_gemm", "72 rows, 4x48x80, gradients", _ragged(48, 80, torch.float32), FP32, gradient=True),
    Case("grouped_gemm_masked", "4x24 rows, 4x130x200, e4m3", _masked, E4M3_SUMS),
    Case("grouped_wgrad", "72 tokens, 4x130x65, e4m3", _tokens(None), E4M3_SUMS),
    Case("grouped_wgrad", "72 tokens, 4x130x65, bf16, accumulate", _tokens(torch.bfloat16, accumulate=True), FP32),
    Case("quantize_grouped", "72 tokens, 4 groups, 200 columns", _quantize("fp32"), EXACT),
    Case("quantize_grouped", "72 tokens, 4 groups, 200 columns, ue8m0", _quantize("ue8m0"), EXACT),
]
