"""Portable Triton kernel of the rotation. One program rotates some heads of a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.portable import cast, launch
from dskernels.validate import ceil_div

ELEMENTS = 2048  # elements of a program: 16 for each of 128 threads, two loads of 16 bytes in bf16


@triton.jit
def rope_kernel(
    p_x,
    p_cos,
    p_sin,
    p_out,
    heads,
    stride_token,
    stride_head,
    stride_out_token,
    stride_out_head,
    stride_cos,
    stride_sin,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """HEADS heads (program 1) of a token (program 0)."""
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    o_i = tl.arange(0, PAIRS)
    o_x = tl.arange(0, 2 * PAIRS)[None, :]
    mask = (o_h < heads)[:, None] & (o_x < ROPE)
    o_h = o_h.to(tl.int64)[:, None]
    x = tl.load(p_x + i_t * stride_token + o_h * stride_head + o_x, mask=mask, other=0.0)
    even, odd = tl.split(tl.reshape(x.to(tl.float32), [HEADS, PAIRS, 2]))
    cos = tl.load(p_cos + i_t * stride_cos + o_i, mask=o_i < ROPE // 2, other=0.0)[None, :]
    sin = tl.load(p_sin + i_t * stride_sin + o_i, mask=o_i < ROPE // 2, other=0.0)[None, :]
    y = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [HEADS, 2 * PAIRS])
    p_out += i_t * stride_out_token + o_h * stride_out_head + o_x
    tl.store(p_out, cast(y, p_out.dtype.element_ty), mask=mask)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Fill `out` [T, H, rope], which may be `x` itself."""
    tokens, heads, rope = x.shape
    if x.numel() == 0:
        return
    constants = options(rope)
    launch(
        rope_kernel,
        (tokens, ceil_div(heads, constants["HEADS"])),
        x,
        cos,
        sin,
        out,
        heads,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        cos.stride(0),
        sin.stride(0),
        **constants,
        num_warps=4,
    )


def apply_rope_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate `x` in place."""
    apply_rope(x, cos, sin, x)


def options(rope: int) -> dict[str, int]:
    """The options that the kernel is specialised by."""
    pairs = triton.next_power_of_2(rope // 2)
    return {"ROPE": rope, "HEADS": max(ELEMENTS // (2 * pairs), 1), "PAIRS": pairs}


def apply_rope_supports(x: Tensor, *args: Tensor) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    return "float64 runs on the reference only" if x.dtype == torch.float64 else None


apply_rope_in_place_supports = apply_rope_supports
