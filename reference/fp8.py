"""Quantising to e4m3 with one scale per tile (DeepSeek-V3 report, section 3.3.2), as plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dskernels.types import Block, Fp8Tensor

E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126


def tile_scale(amax: Tensor, scale_format: str = "fp32") -> Tensor:
    """The scale of a tile whose largest magnitude is `amax`: amax / 448, at least 2^-126, and 1 if amax is 0.

    UE8M0 rounds it up to a power of two, by carrying any mantissa bit into the exponent.
    """
    # Divide by a tensor: on CUDA, torch divides by a number by multiplying with its reciprocal, which is off by an ulp.
    scale = (amax / torch.full_like(amax, E4M3_MAX)).clamp(min=SMALLEST_SCALE)
    if scale_format == "ue8m0":
        power = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
        scale = torch.where(scale.isfinite(), power, scale)
    return torch.where(amax == 0, 1.0, scale)


def quantize(x: Tensor, block: Block = (1, 128), *, scale_format: str = "fp32", transpose: bool = False) -> Fp8Tensor:
    """Quantise `x` [rows, cols] to e4m3 in tiles of `block`: q = round(x / scale), ties to even, scale = max|tile| /
    448.

    With `transpose`, x.T is quantised, in tiles of the transposed block. A stack [E, rows, cols] is quantised matrix by
    matrix.
    """
    if transpose:
        return quantize(x.mT, (block[1], block[0]), scale_format=scale_format)
    if x.dim() == 3 and len(x) == 0:
        one = quantize(x.new_zeros(1, *x.shape[1:]), block)
        return Fp8Tensor(one.data[:0], one.scale[:0], block)
    if x.dim() == 3:
        return _stack([quantize(matrix, block, scale_format=scale_format) for matrix in x], block)
    (rows, cols), (br, bc) = x.shape, block
    tiles = F.pad(x.float(), (0, -cols % bc, 0, -rows % br))
    tiles = tiles.reshape(-(-rows // br), br, -(-cols // bc), bc)
    scale = tile_scale(tiles.abs().amax((1, 3)), scale_format)
    q = (tiles / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    q = q.flatten(2).flatten(0, 1)[:rows, :cols].to(torch.float8_e4m3fn)
    return Fp8Tensor(q.contiguous(), scale_layout(scale, block), block)


def _stack(matrices: list[Fp8Tensor], block: Block) -> Fp8Tensor:
    return Fp8Tensor(torch.stack([m.data for m in matrices]), torch.stack([m.scale for m in matrices]), block)


def scale_layout(scale: Tensor, block: Block) -> Tensor:
    """`scale` in the layout of its block: row-major, except that for (1, 128) rows are contiguous and columns padded
    to 16 bytes."""
    if block != (1, 128):
        return scale.contiguous()
    rows, cols = scale.shape
    return scale.new_empty_strided((rows, cols), (1, -(-rows // 4) * 4)).copy_(scale)


def quantize_both(x: Tensor, *, block: Block = (1, 128), scale_format: str = "fp32") -> tuple[Fp8Tensor, Fp8Tensor]:
    """Quantise `x` [rows, cols] in 1x128 tiles, and x.T in 1x128 tiles: the operands of Dgrad and of Wgrad.

    With a block of (128, 128), both are quantised in those blocks: a weight for Fprop and for Dgrad.
    """
    by_row = quantize(x, block, scale_format=scale_format)
    by_column = quantize(x, (block[1], block[0]), scale_format=scale_format, transpose=True)
    # x.T in tiles of its own 128 columns; or in the same blocks, transposed.
    return by_row, by_column._replace(block=block)


def widened(x: Tensor) -> Tensor:
    """`x` in fp32; fp64 stays fp64, so that the formulas below can be checked more closely than fp32 allows."""
    return x if x.dtype == torch.float64 else x.float()


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up in fp32, of `gate_up` [T, 2I]: the gate in the first half of the columns, up in the second."""
    gate, up = widened(gate_up).chunk(2, dim=-1)
    return gate * gate.sigmoid() * up


def swiglu_gradient(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient [T, 2I] of silu(gate) * up, in fp32: dy * up * (s + gate * s * (1 - s)) and dy * gate * s.

    s = sigmoid(gate).
    """
    gate, up = widened(gate_up).chunk(2, dim=-1)
    dy, s = widened(dy), gate.sigmoid()
    return torch.cat([dy * up * (s + gate * s * (1 - s)), dy * gate * s], dim=-1)


def swiglu_quantize(gate_up: Tensor, *, scale_format: str = "fp32", transpose: bool = False) -> Fp8Tensor:
    """Quantise silu(gate) * up [T, I] in 1x128 tiles, or its transpose in 1x128 tiles; nothing is rounded in
    between."""
    block = (128, 1) if transpose else (1, 128)
    return quantize(swiglu(gate_up), block, scale_format=scale_format, transpose=transpose)


def swiglu_quantize_backward(dy: Tensor, gate_up: Tensor, *, scale_format: str = "fp32") -> tuple[Fp8Tensor, Fp8Tensor]:
    """Quantise the gradient of silu(gate) * up in both ways of `quantize_both`; nothing is rounded in between."""
    return quantize_both(swiglu_gradient(dy, gate_up), scale_format=scale_format)


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in fp32, the mean in fp64 (Zhang and Sennrich, arXiv 1910.07467, eq. 4)."""
    x = widened(x)
    mean = x.double().square().mean(-1, keepdim=True).to(x.dtype)
    root = (mean + eps).double().sqrt().to(x.dtype)  # correctly rounded; torch's own fp32 root is not, on some CPUs
    return x * (1 / root) * widened(weight)


def rmsnorm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of RMSNorm(x): dx = r * (g - n * mean(g * n)) [+ dresidual], n = x * r, g = dy * weight; dweight.

    r = 1 / sqrt(mean(x^2) + eps); dweight is the sum of dy * n over tokens.
    """
    wide, dy = widened(x), widened(dy)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    n, g = wide * r, dy * widened(weight)
    dx = r * (g - n * (g * n).mean(-1, keepdim=True))
    if dresidual is not None:
        dx = dx + widened(dresidual)
    return dx.to(x.dtype), (dy * n).sum(0).to(weight.dtype)


def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    *,
    with_normed: bool = False,
    scale_format: str = "fp32",
) -> Fp8Tensor | tuple[Fp8Tensor, Tensor] | tuple[Fp8Tensor, Tensor, Tensor]:
    """Quantise RMSNorm(x) [T, H] in 1x128 tiles; with `residual`, RMSNorm(x + residual), and also return that sum.

    With `with_normed`, always return the sum too, and the norm.
    """
    total = x if residual is None else x + residual
    normed = rmsnorm(total, weight, eps)
    quantized = quantize(normed, scale_format=scale_format)
    if with_normed:
        return quantized, total, normed.to(x.dtype)
    return quantized if residual is None else (quantized, total)
