"""Portable Triton kernels of the gradient of MLA prefill.

With p_is = exp(scale q_i.k_s - lse_i), the gradients are

    dv_s = sum_i p_is dout_i          ds_is = p_is (dout_i.v_s - delta_i),  delta_i = dout_i.out_i - dlse_i
    dk_s = scale sum_i ds_is q_i      dq_i = scale sum_s ds_is k_s

One kernel computes delta, one walks the queries for a tile of keys (dk, dv), one the keys for a tile of queries (dq).
Every sum is made by one program in a fixed order, so that equal calls return equal bits; p and ds are computed twice
for that. Parts, tiles and names are those of the forward kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.mla.decode.triton import architecture
from dskernels.mla.prefill.config import choose_config, padded
from dskernels.mla.prefill.triton import (
    LOG2_E,
    Parts,
    find_tile,
    keys_seen,
    load_rows,
    mla_prefill_supports,
    sequence_of,
    store_rows,
)
from dskernels.portable import cast, dot, launch
from dskernels.validate import ceil_div


@triton.jit(do_not_specialize=["tokens"])
def delta_kernel(
    p_dout,
    p_dlse,
    p_out,
    p_delta,
    tokens,
    stride_dt,
    stride_dh,
    stride_ot,
    stride_oh,
    WIDTH_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = dout.out - dlse of BLOCK_M tokens (program 0) of a head (program 1)."""
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    i_h = tl.program_id(1).to(tl.int64)
    o_m = i_m + tl.arange(0, BLOCK_M)
    m_m = o_m < tokens
    # [M, V]
    out = load_rows(p_out + i_m * stride_ot + i_h * stride_oh, stride_ot, m_m, BLOCK_M, WIDTH_V, BLOCK_V)
    dout = load_rows(p_dout + i_m * stride_dt + i_h * stride_dh, stride_dt, m_m, BLOCK_M, WIDTH_V, BLOCK_V)
    o_row = i_h * tokens + o_m
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1) - tl.load(p_dlse + o_row, mask=m_m, other=0.0)
    tl.store(p_delta + o_row, delta, mask=m_m)


@triton.jit(do_not_specialize=["tokens_q", "tokens_k", "sequences"])
def dk_dv_kernel(
    p_dout,
    p_q,
    p_k,
    p_kb,
    p_v,
    p_lse,
    p_delta,
    p_cu_q,
    p_cu_k,
    p_dk,
    p_dkb,
    p_dv,
    stride_dt,
    stride_dh,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_kbt,
    stride_kbh,
    stride_vt,
    stride_vh,
    stride_dkt,
    stride_dkh,
    stride_dkbt,
    stride_dkbh,
    stride_dvt,
    stride_dvh,
    tokens_q,
    tokens_k,
    sequences,
    group,
    scale,
    CAUSAL: tl.constexpr,
    WIDTH_A: tl.constexpr,
    WIDTH_B: tl.constexpr,
    WIDTH_V: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of a tile (program 0) of keys of a key head (program 1), summed over the `group` query heads that
    share it."""
    i_h = tl.program_id(1).to(tl.int64)
    i_span, k_start, k_length, i_n = find_tile(p_cu_k, tl.program_id(0), sequences, tokens_k, BLOCK_N)
    if i_n >= k_length:
        return
    q_start, q_length = sequence_of(p_cu_q, i_span, sequences, tokens_q)

    i_k = (k_start + i_n).to(tl.int64)
    q_start = q_start.to(tl.int64)
    o_n = i_n + tl.arange(0, BLOCK_N)
    m_n = o_n < k_length
    # [N, A], [N, B], [N, V]
    k_a = load_rows(p_k + i_k * stride_kt + i_h * stride_kh, stride_kt, m_n, BLOCK_N, WIDTH_A, BLOCK_A)
    dk_a = tl.zeros([BLOCK_N, BLOCK_A], tl.float32)
    if WIDTH_B > 0:
        k_b = load_rows(p_kb + i_k * stride_kbt + i_h * stride_kbh, stride_kbt, m_n, BLOCK_N, WIDTH_B, BLOCK_B)
        dk_b = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    v = load_rows(p_v + i_k * stride_vt + i_h * stride_vh, stride_vt, m_n, BLOCK_N, WIDTH_V, BLOCK_V)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)

    # Query i sees key j if i >= j + q_length - k_length.
    first = 0
    if CAUSAL:
        first = tl.minimum(tl.maximum(i_n + q_length - k_length, 0), q_length)
    blocks = tl.cdiv(q_length - first, BLOCK_M)
    # One loop over the query blocks of all heads of the group: with nested loops the compiler needs so many registers
    # that the tile would have to be half as large.
    for i_block in range(group * blocks):
        i_qh = i_h * group + i_block // blocks
        i_m = first + i_block % blocks * BLOCK_M
        i_q = q_start + i_m
        o_m = i_m + tl.arange(0, BLOCK_M)
        m_m = o_m < q_length
        # [M, A], [M, B], and the scores [N, M] in units of log 2
        p_q_block = p_q + i_q * stride_qt + i_qh * stride_qh
        q_a = load_rows(p_q_block, stride_qt, m_m, BLOCK_M, WIDTH_A, BLOCK_A)
        score = dot(k_a, tl.trans(q_a))
        if WIDTH_B > 0:
            q_b = load_rows(p_q_block + WIDTH_A, stride_qt, m_m, BLOCK_M, WIDTH_B, BLOCK_B)
            score += dot(k_b, tl.trans(q_b))
        lse = tl.load(p_lse + i_qh * tokens_q + i_q + tl.arange(0, BLOCK_M), mask=m_m, other=float("inf"))
        p = tl.exp2(score * (scale * LOG2_E) - (lse * LOG2_E)[None, :])
        if CAUSAL:  # a query that sees nothing has lse -inf and so p = inf: mask it for every key
            p = tl.where(o_n[:, None] - o_m[None, :] <= k_length - q_length, p, 0.0)
        # [M, V]
        dout = load_rows(p_dout + i_q * stride_dt + i_qh * stride_dh, stride_dt, m_m, BLOCK_M, WIDTH_V, BLOCK_V)
        delta = tl.load(p_delta + i_qh * tokens_q + i_q + tl.arange(0, BLOCK_M), mask=m_m, other=0.0)
        ds = cast(p * (dot(v, tl.trans(dout)) - delta[None, :]), q_a.dtype)
        dv += dot(cast(p, dout.dtype), dout)
        dk_a += dot(ds, q_a)
        if WIDTH_B > 0:
            dk_b += dot(ds, q_b)

    p_dk += i_k * stride_dkt + i_h * stride_dkh
    store_rows(p_dk, dk_a * scale, stride_dkt, m_n, BLOCK_N, WIDTH_A, BLOCK_A)
    if WIDTH_B > 0:
        p_dkb += i_k * stride_dkbt + i_h * stride_dkbh
        store_rows(p_dkb, dk_b * scale, stride_dkbt, m_n, BLOCK_N, WIDTH_B, BLOCK_B)
    store_rows(p_dv + i_k * stride_dvt + i_h * stride_dvh, dv, stride_dvt, m_n, BLOCK_N, WIDTH_V, BLOCK_V)


@triton.jit(do_not_specialize=["tokens_q", "tokens_k", "sequences"])
def dq_kernel(
    p_dout,
    p_q,
    p_k,
    p_kb,
    p_v,
    p_lse,
    p_delta,
    p_cu_q,
    p_cu_k,
    p_dq,
    stride_dt,
    stride_dh,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_kbt,
    stride_kbh,
    stride_vt,
    stride_vh,
    stride_dqt,
    stride_dqh,
    tokens_q,
    tokens_k,
    sequences,
    group,
    scale,
    CAUSAL: tl.constexpr,
    WIDTH_A: tl.constexpr,
    WIDTH_B: tl.constexpr,
    WIDTH_V: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of a tile (program 0) of queries of a head (program 1)."""
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_span, q_start, q_length, i_m = find_tile(p_cu_q, i_tile, sequences, tokens_q, BLOCK_M)
    if i_m >= q_length:
        return
    k_start, k_length = sequence_of(p_cu_k, i_span, sequences, tokens_k)

    i_q = (q_start + i_m).to(tl.int64)
    k_start = k_start.to(tl.int64)
    p_k += k_start * stride_kt + i_h // group * stride_kh
    p_kb += k_start * stride_kbt + i_h // group * stride_kbh
    p_v += k_start * stride_vt + i_h // group * stride_vh
    o_m = i_m + tl.arange(0, BLOCK_M)
    m_m = o_m < q_length
    # [M, A], [M, B], [M, V]
    p_q += i_q * stride_qt + i_h * stride_qh
    q_a = load_rows(p_q, stride_qt, m_m, BLOCK_M, WIDTH_A, BLOCK_A)
    dq_a = tl.zeros([BLOCK_M, BLOCK_A], tl.float32)
    if WIDTH_B > 0:
        q_b = load_rows(p_q + WIDTH_A, stride_qt, m_m, BLOCK_M, WIDTH_B, BLOCK_B)
        dq_b = tl.zeros([BLOCK_M, BLOCK_B], tl.float32)
    dout = load_rows(p_dout + i_q * stride_dt + i_h * stride_dh, stride_dt, m_m, BLOCK_M, WIDTH_V, BLOCK_V)
    o_row = i_h * tokens_q + i_q + tl.arange(0, BLOCK_M)
    lse = tl.load(p_lse + o_row, mask=m_m, other=float("inf"))
    delta = tl.load(p_delta + o_row, mask=m_m, other=0.0)

    seen = keys_seen(o_m, q_length, k_length, CAUSAL)
    by_all = keys_seen(i_m, q_length, k_length, CAUSAL)
    by_any = keys_seen(tl.minimum(i_m + BLOCK_M, q_length) - 1, q_length, k_length, CAUSAL)
    for i_n in range(0, by_any, BLOCK_N):
        i_k = tl.cast(i_n, tl.int64)
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < k_length
        # [N, A], [N, B], and the scores [M, N] in units of log 2
        k_a = load_rows(p_k + i_k * stride_kt, stride_kt, m_n, BLOCK_N, WIDTH_A, BLOCK_A)
        score = dot(q_a, tl.trans(k_a))
        if WIDTH_B > 0:
            k_b = load_rows(p_kb + i_k * stride_kbt, stride_kbt, m_n, BLOCK_N, WIDTH_B, BLOCK_B)
            score += dot(q_b, tl.trans(k_b))
        p = tl.exp2(score * (scale * LOG2_E) - (lse * LOG2_E)[:, None])
        if i_n + BLOCK_N > by_all:
            p = tl.where(o_n[None, :] < seen[:, None], p, 0.0)
        # [N, V]
        v = load_rows(p_v + i_k * stride_vt, stride_vt, m_n, BLOCK_N, WIDTH_V, BLOCK_V)
        ds = cast(p * (dot(dout, tl.trans(v)) - delta[:, None]), k_a.dtype)
        dq_a += dot(ds, k_a)
        if WIDTH_B > 0:
            dq_b += dot(ds, k_b)

    p_dq += i_q * stride_dqt + i_h * stride_dqh
    store_rows(p_dq, dq_a * scale, stride_dqt, m_m, BLOCK_M, WIDTH_A, BLOCK_A)
    if WIDTH_B > 0:
        store_rows(p_dq + WIDTH_A, dq_b * scale, stride_dqt, m_m, BLOCK_M, WIDTH_B, BLOCK_B)


# ---- launcher -------------------------------------------------------------------------------------------------------


def mla_prefill_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, k_rope (empty where there is none) and v."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    tokens_q, heads, _ = q.shape
    tokens_k, heads_k, _ = k.shape
    dout, lse = dout.contiguous(), lse.contiguous()
    delta = _delta(dout, dlse.contiguous(), out.contiguous())

    parts = Parts.of(q, k, k_rope, v)
    if k_rope is None:
        dkb = dk[:, :, parts.widths[0] :]
    else:  # the part of each head is kept separately, in fp32, and summed in order afterwards
        dkb = k_rope.new_empty((tokens_k, heads_k, k_rope.shape[1]), dtype=torch.float32)
    inputs = (dout, q, *parts.keys, v, lse, delta, cu_q, cu_k)
    strides = (*dout.stride()[:2], *q.stride()[:2], *parts.strides, *v.stride()[:2])
    sequences = cu_q.shape[0] - 1
    sizes = (tokens_q, tokens_k, sequences, heads // heads_k, scale)
    if tokens_k:
        config = choose_config("dk_dv", parts.blocks, q.element_size(), architecture(q.device))
        launch(
            dk_dv_kernel,
            (tokens_k // config.block_n + sequences + 2, heads_k),
            *inputs,
            dk,
            dkb,
            dv,
            *strides,
            *dk.stride()[:2],
            *dkb.stride()[:2],
            *dv.stride()[:2],
            *sizes,
            CAUSAL=causal,
            **parts.constants(),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    if tokens_q and heads:
        config = choose_config("dq", parts.blocks, q.element_size(), architecture(q.device))
        launch(
            dq_kernel,
            (tokens_q // config.block_m + sequences + 2, heads),
            *inputs,
            dq,
            *strides,
            *dq.stride()[:2],
            *sizes,
            CAUSAL=causal,
            **parts.constants(),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    dk_rope = k.new_empty(0) if k_rope is None else dkb.sum(1).to(k_rope.dtype)
    return dq, dk, dk_rope, dv


def _delta(dout: Tensor, dlse: Tensor, out: Tensor) -> Tensor:
    """dout.out - dlse of every head and token, [H, T]."""
    tokens, heads, value_dim = out.shape
    delta = dlse.new_empty((heads, tokens), dtype=torch.float32)
    block_m = 16
    if tokens and heads:
        launch(
            delta_kernel,
            (ceil_div(tokens, block_m), heads),
            dout,
            dlse,
            out,
            delta,
            tokens,
            *dout.stride()[:2],
            *out.stride()[:2],
            WIDTH_V=value_dim,
            BLOCK_V=padded(value_dim),
            BLOCK_M=block_m,
            num_warps=4,
            # With a fused multiply-add, each lane adds its own unrounded product to its neighbours' rounded ones: the
            # lanes of a narrow row end up slightly different, and which of them is stored is a race.
            enable_fp_fusion=False,
        )
    return delta


def mla_prefill_backward_supports(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, k_rope: Tensor | None, v: Tensor, *rest: object
) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    return mla_prefill_supports(q, k, k_rope, v)
