"""Portable Triton kernels of MLA decode: flash decoding over the paged latent cache.

A program takes BLOCK_M query rows of one request (its heads and new tokens, packed) and one share of the request's
cached positions. It loads each block of latents once and uses it twice: as keys, with the rope part, and as values. If
the positions are shared between several programs, each writes its part in fp32 with its log-sum-exp, and a second
kernel combines the parts in a fixed order.

Names: `p_` pointer, `i_` index of a program, `o_` offsets, `m_` mask. Shapes in comments: M query rows, N cached
positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.device import capability, multiprocessors
from dskernels.mla.cache.layout import fp8_parts
from dskernels.mla.decode.config import MAX_SPLITS, choose_config, choose_splits
from dskernels.portable import cast, dot, launch, reason_against_e4m3
from dskernels.validate import ceil_div

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = 1.4426950408889634

# ---- steps ----------------------------------------------------------------------------------------------------------


@triton.jit
def clamp(x, high):
    """Integer `x` between 0 and `high`."""
    return tl.minimum(tl.maximum(x, 0), high)


@triton.jit
def load_rows(p_x, o_row, m_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of WIDTH elements at `o_row`, padded to BLOCK columns; masked rows are zero, as 0 * NaN would be NaN."""
    o_c = tl.arange(0, BLOCK)
    if WIDTH == BLOCK:
        return tl.load(p_x + o_row[:, None] + o_c[None, :], mask=m_row[:, None], other=0.0)
    return tl.load(p_x + o_row[:, None] + o_c[None, :], mask=m_row[:, None] & (o_c < WIDTH)[None, :], other=0.0)


@triton.jit
def load_fp8_rows(
    p_x, p_scale, o_row, m_row, dtype: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows of e4m3 at byte `o_row`, times their scale for each 128 columns, in `dtype`."""
    TILE: tl.constexpr = min(BLOCK, 128)
    o_t = tl.arange(0, BLOCK // TILE)
    o_c = o_t[:, None] * TILE + tl.arange(0, TILE)[None, :]
    # [ROWS, BLOCK // TILE, TILE], [ROWS, BLOCK // TILE]
    x = tl.load(
        p_x + o_row[:, None, None] + o_c[None, :, :], mask=m_row[:, None, None] & (o_c < WIDTH)[None, :, :], other=0.0
    )
    scale = tl.load(
        p_scale + o_row[:, None] // 4 + o_t[None, :], mask=m_row[:, None] & (o_t * TILE < WIDTH)[None, :], other=0.0
    )
    return tl.reshape(cast(x.to(tl.float32) * scale[:, :, None], dtype), (ROWS, BLOCK))


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=[
        *["stride_table", "stride_lb", "stride_lp", "stride_lh", "stride_lj"],
        *["heads", "q_tokens", "pages", "page_size", "capacity"],
    ]
)
def decode_kernel(
    p_q,
    p_latent,
    p_scale,
    p_rope,
    p_table,
    p_lengths,
    p_q_lengths,
    p_out,
    p_lse,
    stride_qb,
    stride_qj,
    stride_qh,
    stride_page,
    stride_token,
    stride_table,
    stride_ob,
    stride_op,
    stride_om,
    stride_lb,
    stride_lp,
    stride_lh,
    stride_lj,
    heads,
    q_tokens,
    pages,
    page_size,
    capacity,
    scale_log2,
    VALUE: tl.constexpr,
    ROPE: tl.constexpr,
    FP8: tl.constexpr,
    HAS_Q_LENGTHS: tl.constexpr,
    ONE_PAGE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A row block of a request (program 0) over one share (program 1) of its cached positions.

    Row blocks of a request are adjacent programs, since they read the same rows of the cache.
    """
    row_blocks = tl.cdiv(q_tokens * heads, BLOCK_M)
    i_m = tl.program_id(0) % row_blocks
    i_b = (tl.program_id(0) // row_blocks).to(tl.int64)
    i_p = tl.program_id(1)
    dtype: tl.constexpr = p_q.dtype.element_ty

    # Whatever the integers on the device are, addresses stay within the tables.
    length = clamp(tl.load(p_lengths + i_b), capacity)
    new = q_tokens
    if HAS_Q_LENGTHS:
        new = clamp(tl.load(p_q_lengths + i_b), q_tokens)

    # Row = new token j and head h; it sees the positions before its end.
    row = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = row // heads
    h = row % heads
    m_row = j < q_tokens
    end = tl.where(j < new, length - new + 1 + j, 0)

    share = tl.cdiv(tl.cdiv(length, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    first = i_p * share
    # No row sees beyond the end of the last new token in the block; padding tokens see nothing.
    latest = tl.minimum((i_m * BLOCK_M + BLOCK_M - 1) // heads, new - 1)
    furthest = tl.where(i_m * BLOCK_M // heads < new, length - new + 1 + latest, 0)
    last = tl.minimum(tl.minimum(first + share, length), furthest)

    o_q = i_b * stride_qb + j.to(tl.int64) * stride_qj + h.to(tl.int64) * stride_qh
    # [M, BLOCK_V], [M, BLOCK_R]
    q_latent = load_rows(p_q, o_q, m_row, VALUE, BLOCK_V)
    q_rope = load_rows(p_q + VALUE, o_q, m_row, ROPE, BLOCK_R)

    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    p_table += i_b * stride_table
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < last
        if ONE_PAGE:
            page = clamp(tl.load(p_table + start // page_size), pages - 1)
            o_token = start % page_size + tl.arange(0, BLOCK_N)
        else:
            page = clamp(tl.load(p_table + o_n // page_size, mask=m_n, other=0), pages - 1)
            o_token = o_n % page_size
        o_row = page.to(tl.int64) * stride_page + o_token.to(tl.int64) * stride_token
        # [N, BLOCK_V], [N, BLOCK_R]
        if FP8:
            latent = load_fp8_rows(p_latent, p_scale, o_row, m_n, dtype, BLOCK_N, VALUE, BLOCK_V)
            rope = load_rows(p_rope, o_row // 2, m_n, ROPE, BLOCK_R)
            if rope.dtype != dtype:
                rope = cast(rope.to(tl.float32), dtype)
        else:
            latent = load_rows(p_latent, o_row, m_n, VALUE, BLOCK_V)
            rope = load_rows(p_rope, o_row, m_n, ROPE, BLOCK_R)

        # Scores in units of log 2, [M, N].
        score = (dot(q_latent, tl.trans(latent)) + dot(q_rope, tl.trans(rope))) * scale_log2
        score = tl.where(o_n[None, :] < end[:, None], score, float("-inf"))
        larger = tl.maximum(largest, tl.max(score, 1))
        # A row that has seen nothing has no maximum yet: -inf - (-inf) would be NaN.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        p = tl.exp2(score - base[:, None])
        shrink = tl.exp2(largest - base)
        weight = weight * shrink + tl.sum(p, 1)
        total = total * shrink[:, None] + dot(cast(p, dtype), latent)
        largest = larger

    # No position seen: 0 and -inf. NaN is not equal to 0 and passes through.
    divisor = tl.where(weight == 0, 1.0, weight)
    lse = tl.where(weight == 0, float("-inf"), largest * LN_2 + tl.log(divisor))
    o_v = tl.arange(0, BLOCK_V)
    o_out = i_b * stride_ob + i_p.to(tl.int64) * stride_op + row.to(tl.int64) * stride_om
    m_out = m_row[:, None] & (o_v < VALUE)[None, :]
    tl.store(p_out + o_out[:, None] + o_v[None, :], cast(total / divisor[:, None], p_out.dtype.element_ty), mask=m_out)
    o_lse = i_b * stride_lb + i_p.to(tl.int64) * stride_lp + h.to(tl.int64) * stride_lh + j.to(tl.int64) * stride_lj
    tl.store(p_lse + o_lse, lse, mask=m_row)


@triton.jit(do_not_specialize=["parts", "heads", "q_tokens"])
def combine_kernel(
    p_part,
    p_part_lse,
    p_out,
    p_lse,
    parts,
    heads,
    q_tokens,
    VALUE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """Columns (program 1) of a row of a request (program 0): the parts weighted by e^lse, in order."""
    rows = q_tokens * heads
    i_row = tl.program_id(0) % rows
    i_b = (tl.program_id(0) // rows).to(tl.int64)
    i_v = tl.program_id(1)
    o_all = tl.arange(0, MAX_PARTS)
    every = tl.load(p_part_lse + (i_b * parts + o_all) * rows + i_row, mask=o_all < parts, other=float("-inf"))
    largest = tl.max(every, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weight = tl.sum(tl.exp(every - base), 0)
    divisor = tl.where(weight == 0, 1.0, weight)

    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, parts, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        o_row = (i_b * parts + o_p) * rows + i_row
        p = tl.exp(tl.load(p_part_lse + o_row, mask=o_p < parts, other=float("-inf")) - base)
        # [P, V]
        part = tl.load(
            p_part + o_row[:, None] * VALUE + o_v[None, :],
            mask=(p != 0)[:, None] & (o_v < VALUE)[None, :],
            other=0.0,
        )
        total += tl.sum(p[:, None] * part, 0)
    p_out += (i_b * rows + i_row) * VALUE
    tl.store(p_out + o_v, cast(total / divisor, p_out.dtype.element_ty), mask=o_v < VALUE)
    if i_v == 0:
        lse = tl.where(weight == 0, float("-inf"), base + tl.log(divisor))
        tl.store(p_lse + (i_b * heads + i_row % heads) * q_tokens + i_row // heads, lse)


# ---- launcher -------------------------------------------------------------------------------------------------------


def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    q_lengths: Tensor | None,
    scale: float,
    value_dim: int,
) -> tuple[Tensor, Tensor]:
    """Attention output [B, Q, H, value_dim] and log-sum-exp [B, H, Q]."""
    batch, q_tokens, heads, head_dim = q.shape
    pages, page_size, _ = cache.shape
    out = q.new_empty(batch, q_tokens, heads, value_dim)
    lse = q.new_empty(batch, heads, q_tokens, dtype=torch.float32)
    rows = q_tokens * heads
    if batch == 0 or rows == 0:
        return out, lse
    fp8 = cache.dtype == torch.uint8
    latent, scales, rope = fp8_parts(cache, value_dim) if fp8 else (cache, None, cache[..., value_dim:])

    capacity = block_table.shape[1] * page_size if pages else 0
    config = choose_config(rows, value_dim, q.element_size(), fp8, architecture(q.device))
    row_blocks = ceil_div(rows, config.block_m)
    parts = choose_splits(batch * row_blocks, capacity, multiprocessors(q.device, interpreted=8))
    if parts == 1:
        part, part_lse = out, lse
        stride_op, stride_lb, stride_lp, stride_lh, stride_lj = 0, rows, 0, q_tokens, 1
    else:
        part = q.new_empty(batch, parts, rows, value_dim, dtype=torch.float32)
        part_lse = q.new_empty(batch, parts, rows, dtype=torch.float32)
        stride_op, stride_lb, stride_lp, stride_lh, stride_lj = rows * value_dim, parts * rows, rows, 1, heads
    block_v = triton.next_power_of_2(value_dim)
    launch(
        decode_kernel,
        (batch * row_blocks, parts),
        q,
        latent,
        scales,
        rope,
        block_table,
        lengths,
        q_lengths,
        part,
        part_lse,
        q.stride(0),
        q.stride(1),
        q.stride(2),
        cache.stride(0),
        cache.stride(1),
        block_table.stride(0),
        part.stride(0),
        stride_op,
        value_dim,
        stride_lb,
        stride_lp,
        stride_lh,
        stride_lj,
        heads,
        q_tokens,
        pages,
        page_size,
        capacity,
        scale * LOG2_E,
        VALUE=value_dim,
        ROPE=head_dim - value_dim,
        FP8=fp8,
        HAS_Q_LENGTHS=q_lengths is not None,
        ONE_PAGE=page_size % config.block_n == 0,
        BLOCK_V=block_v,
        BLOCK_R=triton.next_power_of_2(head_dim - value_dim),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if parts > 1:
        columns = min(block_v, 128)
        launch(
            combine_kernel,
            (batch * rows, ceil_div(value_dim, columns)),
            part,
            part_lse,
            out,
            lse,
            parts,
            heads,
            q_tokens,
            VALUE=value_dim,
            BLOCK_V=columns,
            BLOCK_P=16,
            MAX_PARTS=MAX_SPLITS,
            num_warps=4,
        )
    return out, lse


def mla_decode_supports(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    q_lengths: Tensor | None,
    scale: float,
    value_dim: int,
) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    rope_dim = q.shape[-1] - value_dim
    if q.dtype == torch.float64:
        return "float64 runs on the reference only"
    if value_dim > 512 or value_dim % 16 or rope_dim > 64 or rope_dim % 16:
        return (
            "it takes a value dimension up to 512 and a rope dimension up to 64, both multiples of 16, "
            f"not {value_dim} and {rope_dim}"
        )
    if cache.dtype == torch.uint8:
        if q.dtype == torch.float32:
            return "float32 queries over an e4m3 cache run on the reference only"
        return reason_against_e4m3(q.device)
    return None


def architecture(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU, (0, 0) for anything else."""
    return capability(device) if device.type == "cuda" else (0, 0)
