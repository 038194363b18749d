"""Steps that the Triton kernels share, and that mean the same on a GPU and in Triton's CPU interpreter.

The interpreter stores bf16 as integers, truncates where a GPU rounds to nearest even, and multiplies bf16 matrices as
if they were integers. `cast` and `dot` hide that; on a GPU they compile to the plain conversion and the plain product.
"""

import os

import torch
import triton
import triton.language as tl

from dskernels.dispatch import capability

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Cast fp32 `x` to `dtype`, rounding to nearest even; e4m3 wants |x| <= 448 (or NaN)."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            x = _keep_mantissa(x, 7)
        elif dtype == tl.float8e4nv:
            # Below 2^-6 e4m3 is a fixed-point format of step 2^-9: adding 1.5 * 2^14 leaves fp32 with just that step.
            fixed = ((tl.abs(x) + 24576.0) - 24576.0).to(tl.int32, bitcast=True)
            fixed |= x.to(tl.int32, bitcast=True) & -0x80000000
            x = tl.where(tl.abs(x) < 0.015625, fixed.to(tl.float32, bitcast=True), _keep_mantissa(x, 3))
            x = tl.where(x == x, x, 480.0)  # the value that NaN's bits would have
    return x.to(dtype)


@triton.jit
def _keep_mantissa(x, bits: tl.constexpr):
    """Round fp32 `x` to `bits` bits of mantissa, ties to even, by integer arithmetic on its representation."""
    drop: tl.constexpr = 23 - bits
    i = x.to(tl.int32, bitcast=True)
    i = (i + ((1 << (drop - 1)) - 1) + ((i >> drop) & 1)) & ~((1 << drop) - 1)
    return tl.where(x == x, i.to(tl.float32, bitcast=True), x)


@triton.jit
def dot(a, b):
    """fp32 product of two tiles of one dtype, from zero; fp32 operands are multiplied exactly, not as tf32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


def reason_against_e4m3(device: torch.device) -> str | None:
    """Why kernels that make or multiply e4m3 do not run on `device`, or None: NVIDIA GPUs have it from sm_89 on."""
    if device.type == "cuda" and torch.version.hip is None and capability(device) < (8, 9):
        return "e4m3 needs sm_89 or newer, this GPU is sm_{}{}".format(*capability(device))
    return None
