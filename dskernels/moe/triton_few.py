"""The expert block for a few tokens with weights that are not quantised, in two launches of portable kernels.

With so few tokens nothing is sorted, copied or appended. Each choice of each token is a row of its own: the first
kernel computes silu(gate) * up of each, the second multiplies by w2 and adds up each token's rows. A program reads the
weights of an expert for one row only. This suits the decoding of one sequence, where an expert is hardly ever chosen
twice; if two tokens choose the same expert, the second reads its weights from the L2.

Names: `p_` pointer, `i_` index of a program or tile, `o_` offsets, `m_` mask.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dskernels.device import empty
from dskernels.moe.config_matvec import MOST_CHOICES, MOST_TOKENS, choose_matvec, power_of_two
from dskernels.moe.experts import Block, Network
from dskernels.portable import INTERPRETED, begin_dependent, cast, launch, programmatic
from dskernels.types import Fp8Tensor
from dskernels.validate import ceil_div

# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["top_k", "n_experts", "n_shared"])
def few_up_kernel(
    p_x,
    p_w13,
    p_shared,
    p_experts,
    p_hidden,
    top_k,
    n_experts,
    n_shared,
    H,
    inner,
    inner_shared,
    stride_x,
    stride_we,
    stride_wn,
    stride_sn,
    stride_ids,
    stride_hidden,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Compute BLOCK columns of silu(gate) * up for one choice of one token.

    The columns of a token's row in `p_hidden` are those of its `top_k` choices one after another (`inner` each), then
    those of the `n_shared` experts that follow the `n_experts` routed ones in the stack, then those of the separate
    shared network `p_shared` (`inner_shared`).
    """
    begin_dependent(PROGRAMMATIC)
    i_t = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(inner, BLOCK)
    i_c = tl.program_id(1) // blocks
    own = i_c < top_k + n_shared
    i_c = tl.minimum(i_c, top_k + n_shared)
    i_n = tl.program_id(1) - i_c * blocks
    expert = tl.load(p_experts + i_t * stride_ids + i_c, mask=i_c < top_k, other=0).to(tl.int64)
    chosen = tl.where(i_c < top_k, (expert >= 0) & (expert < n_experts), True)
    if not chosen:
        return
    expert = tl.where(i_c < top_k, expert, n_experts + i_c - top_k)
    width = tl.where(own, inner, inner_shared)
    o_n = i_n * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < width
    o_k = tl.arange(0, BLOCK_K)
    if own:
        p_gate = p_w13 + expert * stride_we + o_n.to(tl.int64)[:, None] * stride_wn
        p_up = p_gate + tl.cast(inner, tl.int64) * stride_wn
    else:
        p_gate = p_shared + o_n.to(tl.int64)[:, None] * stride_sn
        p_up = p_gate + tl.cast(inner_shared, tl.int64) * stride_sn
    gate = tl.zeros([BLOCK], tl.float32)
    up = tl.zeros([BLOCK], tl.float32)
    for start in range(0, H, BLOCK_K):
        m_k = start + o_k < H
        mask = m_n[:, None] & m_k[None, :]
        x = tl.load(p_x + i_t * stride_x + start + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
        gate += tl.sum(tl.load(p_gate + (start + o_k)[None, :], mask=mask, other=0.0).to(tl.float32) * x, axis=1)
        up += tl.sum(tl.load(p_up + (start + o_k)[None, :], mask=mask, other=0.0).to(tl.float32) * x, axis=1)
    dtype: tl.constexpr = p_hidden.dtype.element_ty
    gate = cast(gate, dtype).to(tl.float32)
    hidden = gate * tl.sigmoid(gate) * cast(up, dtype).to(tl.float32)
    tl.store(p_hidden + i_t * stride_hidden + i_c * inner + o_n, cast(hidden, dtype), mask=m_n)


@triton.jit(do_not_specialize=["top_k", "n_experts", "n_shared"])
def few_down_kernel(
    p_hidden,
    p_w2,
    p_shared,
    p_experts,
    p_weights,
    p_out,
    top_k,
    n_experts,
    n_shared,
    H,
    inner,
    inner_shared,
    stride_hidden,
    stride_we,
    stride_wn,
    stride_sn,
    stride_ids,
    stride_weights,
    stride_out,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Compute BLOCK columns of the weighted sum of one token's experts, multiplying all of its choices side by side.

    Each expert's output is rounded to the dtype of `p_out` before it is weighted.
    """
    begin_dependent(PROGRAMMATIC)
    i_t = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < H
    o_c = tl.arange(0, CHOICES)
    o_k = tl.arange(0, BLOCK_K)
    expert = tl.load(p_experts + i_t * stride_ids + o_c, mask=o_c < top_k, other=-1).to(tl.int64)
    m_c = (expert >= 0) & (expert < n_experts)
    weight = tl.load(p_weights + i_t * stride_weights + o_c, mask=m_c, other=0.0)
    is_shared = (o_c >= top_k) & (o_c < top_k + n_shared)
    expert = tl.where(is_shared, n_experts + o_c - top_k, expert)
    weight = tl.where(is_shared, 1.0, weight)
    m_c = m_c | is_shared

    # [BLOCK, CHOICES, BLOCK_K]
    p_row = p_w2 + o_n.to(tl.int64)[:, None, None] * stride_wn + expert[None, :, None] * stride_we
    p_of = p_hidden + i_t * stride_hidden + o_c[:, None] * inner
    total = tl.zeros([BLOCK, CHOICES], tl.float32)
    for start in range(0, inner, BLOCK_K):
        m_k = m_c[:, None] & (start + o_k < inner)[None, :]
        hidden = tl.load(p_of + (start + o_k)[None, :], mask=m_k, other=0.0).to(tl.float32)
        w2 = tl.load(p_row + (start + o_k)[None, None, :], mask=m_n[:, None, None] & m_k[None], other=0.0)
        total += tl.sum(w2.to(tl.float32) * hidden[None], axis=2)
    dtype: tl.constexpr = p_out.dtype.element_ty
    out = tl.sum(cast(total, dtype).to(tl.float32) * weight[None, :], axis=1)

    if inner_shared > 0:
        last = tl.zeros([BLOCK], tl.float32)
        p_last = p_hidden + i_t * stride_hidden + (top_k + n_shared) * inner
        for start in range(0, inner_shared, BLOCK_K):
            m_k = start + o_k < inner_shared
            hidden = tl.load(p_last + start + o_k, mask=m_k, other=0.0).to(tl.float32)
            p_tile = p_shared + o_n.to(tl.int64)[:, None] * stride_sn + (start + o_k)[None, :]
            w2 = tl.load(p_tile, mask=m_n[:, None] & m_k[None, :], other=0.0)
            last += tl.sum(w2.to(tl.float32) * hidden[None, :], axis=1)
        out += cast(last, dtype).to(tl.float32)
    tl.store(p_out + i_t * stride_out + o_n, cast(out, dtype), mask=m_n)


# ---- launcher -------------------------------------------------------------------------------------------------------


def fused_experts(block: Block) -> Tensor | None:
    """Output [T, H]; None if these kernels do not take it: too many tokens, or rows of weights not contiguous."""
    x, dtype, network, weights, experts, n_shared, shared = block
    if isinstance(x, Fp8Tensor) or not _fits(x, network, experts, n_shared, shared):
        return None
    (tokens, width), (total, _, inner), top_k = x.shape, network.w2.shape, experts.shape[1]
    inner_shared = 0 if shared is None else shared.w2.shape[1]
    n_experts, columns = total - n_shared, (top_k + n_shared) * inner + inner_shared
    w13, w2 = (network.w13, network.w2) if shared is None else (shared.w13, shared.w2)
    hidden, out = empty(x, (tokens, columns), dtype), empty(x, (tokens, width), dtype)
    up, down = (choose_matvec(size, bool(INTERPRETED)) for size in (width, inner))
    choices = power_of_two(top_k + n_shared)
    launch(
        few_up_kernel,
        (tokens, (top_k + n_shared) * ceil_div(inner, up.rows) + ceil_div(inner_shared, up.rows)),
        *(x, network.w13, w13, experts, hidden, top_k, n_experts, n_shared, width, inner, inner_shared),
        *(x.stride(0), *network.w13.stride()[:2], w13.stride(-2), experts.stride(0), columns),
        BLOCK=up.rows,
        BLOCK_K=up.columns,
        num_warps=up.num_warps,
        **programmatic(x),
    )
    launch(
        few_down_kernel,
        (tokens, ceil_div(width, down.rows)),
        *(hidden, network.w2, w2, experts, weights, out, top_k, n_experts, n_shared, width, inner, inner_shared),
        *(columns, *network.w2.stride()[:2], w2.stride(-2), experts.stride(0), weights.stride(0), width),
        CHOICES=choices,
        BLOCK=down.rows,
        BLOCK_K=max(down.columns // choices, 16),
        num_warps=down.num_warps,
        **programmatic(x),
    )
    return out


def _fits(x: Tensor, network: Network, experts: Tensor, n_shared: int, shared: Network | None) -> bool:
    matrices = (network.w13, network.w2, *(() if shared is None else (shared.w13, shared.w2)))
    few = 0 < x.shape[0] <= MOST_TOKENS and 0 < experts.shape[1] + n_shared <= MOST_CHOICES
    plain = all(matrix.dtype == x.dtype and matrix.stride(-1) == 1 for matrix in matrices)
    return few and plain and x.stride(1) == 1 and network.w2.shape[2] > 0 and x.shape[1] > 0
