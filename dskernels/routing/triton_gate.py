"""Portable Triton kernels of the gate: hidden states times the experts' vectors, in fp32, and the gradients.

Tensor cores multiply bf16 exactly, so an fp32 operand is written as the sum of three bf16 numbers, which together have
all its 24 bits, and an fp16 one as that of two; all products of pieces above 2^-24 of the whole are computed. Tensor
cores also add in fp32, but they truncate instead of rounding: over K = 7,168, logits of bf16 operands were off by 8e-6
of their size, of fp32 operands by 5e-5. So they only add up one tile along K, and ordinary additions do the rest: 2e-7
and 3e-7.

One kernel computes all three products, by strides. If there are few tiles, K is divided, and the parts are added in
order: no atomics, and the same bits in every call.

Names: `p_` pointer, `o_` offsets, `m_` mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.device import multiprocessors
from dskernels.gemm.triton import architecture
from dskernels.portable import begin_dependent, cast, dot, launch, programmatic
from dskernels.recording import Recorded
from dskernels.routing.config import GateConfig, choose_gate_config
from dskernels.validate import ceil_div

PIECES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
# By default ptxas spills some registers to stay at 128, although as many as it needs are available.
OPTIONS = {} if torch.version.hip else {"maxnreg": 255}


@triton.jit
def piece(x, i: tl.constexpr):
    """The i-th bf16 piece of fp32 `x`: the remainder after the preceding pieces, rounded."""
    for _ in tl.static_range(i):
        x -= cast(x, tl.bfloat16).to(tl.float32)
    return cast(x, tl.bfloat16)


@triton.jit
def multiply(a, b, PIECES_A: tl.constexpr, PIECES_B: tl.constexpr):
    """a b, from the pieces that count, small ones first: the i-th times the j-th is 2^(-8 (i + j)) of the whole."""
    if PIECES_A == 1 and PIECES_B == 1:
        return dot(a, b)
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    product = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
    for rank in tl.static_range(2, -1, -1):
        for i in tl.static_range(PIECES_A):
            for j in tl.static_range(PIECES_B):
                if i + j == rank:
                    product += dot(piece(a, i), piece(b, j))
    return product


@triton.jit(do_not_specialize=["M", "N", "K"])
def gate_kernel(
    p_a,
    p_b,
    p_out,
    M,
    N,
    K,
    K_of_part,
    one,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    PIECES_A: tl.constexpr,
    PIECES_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One part's tile of a @ b.T; a is [M, K] and b [N, K] by their strides; out is [parts, M, N], contiguous.

    WHOLE: K is a multiple of BLOCK_K. With a mask along K, loads would neither be of 16 bytes nor asynchronous.
    one: 1.0, unknown to the compiler, which would otherwise let tensor cores add up all of K, truncating instead of
    rounding.
    """
    begin_dependent(PROGRAMMATIC)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    o_m = (tile // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (tile % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K).to(tl.int64)
    m_m = o_m < M
    m_n = o_n < N
    part = tl.program_id(1)
    first = part * K_of_part
    rest = tl.minimum(K_of_part, K - first)

    # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]; rows beyond the end read the last one.
    p_a_tile = p_a + tl.minimum(o_m, M - 1)[:, None] * stride_am + (first + o_k)[None, :] * stride_ak
    p_b_tile = p_b + (first + o_k)[:, None] * stride_bk + tl.minimum(o_n, N - 1)[None, :] * stride_bn
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for left in range(rest, 0, -BLOCK_K):
        if WHOLE:
            a = tl.load(p_a_tile)
            b = tl.load(p_b_tile)
        else:
            m_k = o_k < left
            a = tl.load(p_a_tile, mask=m_k[None, :], other=0.0)
            b = tl.load(p_b_tile, mask=m_k[:, None], other=0.0)
        total += multiply(a, b, PIECES_A, PIECES_B) * one
        p_a_tile += BLOCK_K * stride_ak
        p_b_tile += BLOCK_K * stride_bk
    p_tile = p_out + part.to(tl.int64) * M * N + o_m[:, None] * N + o_n[None, :]
    tl.store(p_tile, cast(total, p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["n", "parts"])
def sum_parts_kernel(p_parts, p_out, n, parts, BLOCK: tl.constexpr):
    """Sum of `parts` rows of n numbers, in order."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    total = tl.zeros([BLOCK], tl.float32)
    p_part = p_parts + o_n
    for _ in range(parts):
        total += tl.load(p_part, mask=m_n, other=0.0)
        p_part += n
    tl.store(p_out + o_n, cast(total, p_out.dtype.element_ty), mask=m_n)


@Recorded
def gate_parts(x: Tensor, weight: Tensor) -> Tensor:
    """Logits of `x` [T, H], fp32 [parts, T, E], still to be summed."""
    (T, H), E = x.shape, weight.shape[0]
    if T == 0:
        return x.new_empty((1, T, E), dtype=torch.float32)
    config = _config(T, E, H, x, weight)
    parts = x.new_empty((config.parts, T, E), dtype=torch.float32)
    _product(config, x, x.stride(), weight, weight.stride(), H, parts)
    return parts


def gate(x: Tensor, weight: Tensor) -> Tensor:
    """Logits of `x` [T, H], fp32 [T, E]."""
    return _summed(gate_parts(x, weight), torch.float32)


def gate_backward(
    dlogits: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and of `weight` in their dtypes, empty if not needed; `dlogits` is fp32 [T, E]."""
    (T, H), E = x.shape, weight.shape[0]
    dx, dweight = x.new_empty((T, H) if needs_x else 0), weight.new_empty((E, H) if needs_weight else 0)
    if needs_x and T > 0:
        dx = _gradient(T, H, E, dlogits, dlogits.stride(), weight, weight.stride()[::-1], x.dtype)
    if needs_weight and T == 0:
        dweight.zero_()
    elif needs_weight:
        strides = dlogits.stride()[::-1], x.stride()[::-1]
        dweight = _gradient(E, H, T, dlogits, strides[0], x, strides[1], weight.dtype, of_weight=True)
    return dx, dweight


def _gradient(
    m: int,
    n: int,
    k: int,
    a: Tensor,
    a_strides: tuple,
    b: Tensor,
    b_strides: tuple,
    dtype: torch.dtype,
    of_weight: bool = False,
) -> Tensor:
    config = _config(m, n, k, a, b, of_weight)
    parts = a.new_empty((config.parts, m, n), dtype=dtype if config.parts == 1 else torch.float32)
    _product(config, a, a_strides, b, b_strides, k, parts)
    return _summed(parts, dtype)


def _config(m: int, n: int, k: int, a: Tensor, b: Tensor, of_weight: bool = False) -> GateConfig:
    wide = a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16
    processors = multiprocessors(a.device, interpreted=4)
    return choose_gate_config(m, n, k, wide, processors, architecture(a.device), of_weight=of_weight)


def _product(
    config: GateConfig, a: Tensor, a_strides: tuple, b: Tensor, b_strides: tuple, k: int, parts: Tensor
) -> None:
    """Fill `parts` [parts, M, N] with a @ b.T, for operands [M, K] and [N, K] with these strides."""
    _, m, n = parts.shape
    blocks = ceil_div(ceil_div(k, config.block_k), config.parts)
    launch(
        gate_kernel,
        (ceil_div(m, config.block_m) * ceil_div(n, config.block_n), config.parts),
        a,
        b,
        parts,
        m,
        n,
        k,
        blocks * config.block_k,
        1.0,
        *a_strides,
        *b_strides,
        PIECES_A=PIECES[a.dtype],
        PIECES_B=PIECES[b.dtype],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        WHOLE=k % config.block_k == 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **OPTIONS,
        **programmatic(a),
    )


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    if parts.shape[0] == 1:
        return parts[0]
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    n = out.numel()
    launch(sum_parts_kernel, (ceil_div(n, 1024),), parts, out, n, parts.shape[0], BLOCK=1024)
    return out
