"""Matrix products of block-scaled e4m3 matrices (DeepSeek-V3 report, section 3.3.2), as plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from dskernels.reference.fp8 import quantize
from dskernels.types import Fp8Tensor


def fp8_gemm(
    a: Fp8Tensor,
    b: Fp8Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """a [M, K] @ b [N, K].T, promoted to fp32 every 128 along K.

    It is the sum over blocks k of (q_a[:, k] @ q_b[:, k].T) * s_a[:, k] * s_b[:, k].
    """
    (m, k), n = a.data.shape, b.data.shape[0]
    total = torch.zeros(m, n, dtype=torch.float32, device=a.data.device)
    for i, start in enumerate(range(0, k, 128)):
        stop = min(start + 128, k)
        part = a.data[:, start:stop].float() @ b.data[:, start:stop].float().T
        scale_b = b.scale[:, i].repeat_interleave(b.block[0])[:n]
        total += part * (a.scale[:, i, None] * scale_b)
    if bias is not None:
        total += bias.float()
    if out is None:
        return total.to(out_dtype)
    return out.copy_(out.float() + total if accumulate else total)


def fp8_linear(
    x: Tensor,
    weight: Tensor | Fp8Tensor,
    bias: Tensor | None = None,
    *,
    scale_format: str = "fp32",
    dy_format: str = "fp32",
) -> Tensor:
    """x [..., K] @ weight [N, K].T + bias, with all three products of the layer in e4m3 (report, figure 6).

    Fprop: x in 1x128 tiles by weight in 128x128 blocks. Dgrad: dy in 1x128 tiles by the same weight. Wgrad: dy.T by
    x.T, both in tiles of 128 tokens. `scale_format` is that of the scales of x, `dy_format` of dy in Dgrad.
    """
    quantized = quantize(weight.detach(), (128, 128)) if isinstance(weight, Tensor) else weight
    master = weight if isinstance(weight, Tensor) else None
    y = _Fp8Linear.apply(x.flatten(0, -2), master, quantized, bias, scale_format, dy_format)
    return y.unflatten(0, x.shape[:-1])


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, quantized, bias, scale_format, dy_format):
        ctx.save_for_backward(x, weight, bias)
        ctx.quantized, ctx.scale_format, ctx.dy_format = quantized, scale_format, dy_format
        return fp8_gemm(quantize(x, scale_format=scale_format), quantized, out_dtype=x.dtype, bias=bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        weight_t = Fp8Tensor(ctx.quantized.data.t().contiguous(), ctx.quantized.scale.t().contiguous(), (128, 128))
        dx = fp8_gemm(quantize(dy, scale_format=ctx.dy_format), weight_t, out_dtype=x.dtype)
        dw = db = None
        if weight is not None:
            dy_t = quantize(dy, (128, 1), transpose=True)
            x_t = quantize(x, (128, 1), scale_format=ctx.scale_format, transpose=True)
            dw = fp8_gemm(dy_t, x_t, out_dtype=torch.float32).to(weight.dtype)
        if bias is not None:
            db = dy.float().sum(0).to(bias.dtype)
        return dx, dw, None, db, None, None
