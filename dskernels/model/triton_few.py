"""Triton kernels of `few` that multiply and normalise: a program has all of the few rows and some columns, or one row.

Names: `p_` pointer, `o_` offsets, `m_` mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.portable import INTERPRETED, begin_dependent, cast, launch, programmatic
from dskernels.validate import ceil_div

SINGLE_OR_HALF = (torch.bfloat16, torch.float16, torch.float32)
MOST_ROWS, MOST_WIDTH = 8, 8192
ROWS_BY_COLUMNS, MOST_BLOCK_K = 8, 512  # of a tile; estimates, as a chip has room for more programs than there are

# ---- products -------------------------------------------------------------------------------------------------------


@triton.jit
def load_stream(p_x, p_update, o_r, o_k, mask, stride_x, stride_update, UPDATE: tl.constexpr):
    """Rows of x + update, in fp32 but rounded as the residual stream is."""
    x = tl.load(p_x + o_r[:, None] * stride_x + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
    if UPDATE:
        more = tl.load(p_update + o_r[:, None] * stride_update + o_k[None, :], mask=mask, other=0.0)
        x = cast(x + more.to(tl.float32), p_x.dtype.element_ty).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["rows"])
def products_kernel(
    p_x,
    p_update,
    p_norm,
    p_weight,
    p_second,
    p_out,
    p_stream,
    p_normed,
    rows,
    K,
    N,
    N_second,
    stride_x,
    stride_update,
    stride_weight,
    stride_second,
    eps,
    UPDATE: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """COLUMNS columns of h @ weight.T, or of h @ second.T behind those; h is the norm of x + update, a SwiGLU of x, or
    x.

    The first program also stores x + update and h, if they are wanted. WHOLE means that K is at most BLOCK_K: the
    weights, which no kernel of a step writes, are then requested before the preceding kernel has ended.
    """
    o_r = tl.arange(0, ROWS).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_r = (o_r < rows)[:, None]
    dtype: tl.constexpr = p_x.dtype.element_ty
    tiles = tl.cdiv(N, COLUMNS)
    i_n = tl.program_id(0)
    o_n = i_n * COLUMNS + tl.arange(0, COLUMNS)
    p_rows = p_weight + o_n.to(tl.int64)[:, None] * stride_weight
    n = N
    before = 0
    if i_n >= tiles:
        o_n -= tiles * COLUMNS
        p_rows = p_second + o_n.to(tl.int64)[:, None] * stride_second
        n = N_second
        before = N
    m_n = o_n < n
    if WHOLE:
        weight = tl.load(p_rows + o_k[None, :], mask=m_n[:, None] & (o_k < K)[None, :], other=0.0)
    begin_dependent(PROGRAMMATIC)

    inverse = tl.full([ROWS], 1.0, tl.float32)
    if NORM:
        squares = tl.zeros([ROWS], tl.float32)
        for start in range(0, K, BLOCK_K):
            x = load_stream(p_x, p_update, o_r, start + o_k, m_r & (start + o_k < K), stride_x, stride_update, UPDATE)
            squares += tl.sum(x * x, axis=1)
        inverse = 1.0 / tl.sqrt(squares / K + eps)

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, K, BLOCK_K):
        m_k = start + o_k < K
        if not WHOLE:
            weight = tl.load(p_rows + (start + o_k)[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
        h = load_stream(p_x, p_update, o_r, start + o_k, m_r & m_k[None, :], stride_x, stride_update, UPDATE)
        p_tile = o_r[:, None] * K + (start + o_k)[None, :]
        if UPDATE:
            tl.store(p_stream + p_tile, cast(h, dtype), mask=m_r & m_k[None, :] & (i_n == 0))
        if GATED:
            p_up = p_x + o_r[:, None] * stride_x + K + (start + o_k)[None, :]
            up = tl.load(p_up, mask=m_r & m_k[None, :], other=0.0).to(tl.float32)
            h = cast(cast(h * tl.sigmoid(h), dtype).to(tl.float32) * up, dtype).to(tl.float32)
        if NORM:
            scale = tl.load(p_norm + start + o_k, mask=m_k, other=0.0).to(tl.float32)
            h = cast(h * inverse[:, None] * scale[None, :], dtype).to(tl.float32)
        if NORMED:
            tl.store(p_normed + p_tile, cast(h, dtype), mask=m_r & m_k[None, :] & (i_n == 0))
        total += tl.sum(h[:, None, :] * weight.to(tl.float32)[None, :, :], axis=2)
    p_out += o_r[:, None] * (N + N_second) + before + o_n[None, :]
    tl.store(p_out, cast(total, dtype), mask=m_r & m_n[None, :])


def products(
    x: Tensor,
    update: Tensor | None,
    norm: Tensor | None,
    weight: Tensor,
    second: Tensor | None,
    eps: float,
    gated: bool,
    with_normed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `few.products`."""
    rows, (n, k) = x.shape[0], weight.shape
    n_second = 0 if second is None else second.shape[0]
    out = x.new_empty(rows, n + n_second)
    stream, normed = (
        x.new_empty(rows, k) if wanted else x.new_empty(0) for wanted in (update is not None, with_normed)
    )
    if rows and n:
        padded, block_k = triton.next_power_of_2(rows), max(16, min(MOST_BLOCK_K, triton.next_power_of_2(k)))
        # The time of the interpreter depends on the number of programs, not on what they do.
        columns = 32 if INTERPRETED else max(ROWS_BY_COLUMNS // padded, 2)
        launch(
            products_kernel,
            (ceil_div(n, columns) + ceil_div(n_second, columns),),
            *(x, update, norm, weight, weight if second is None else second, out, stream, normed, rows, k, n, n_second),
            *(x.stride(0), 0 if update is None else update.stride(0), weight.stride(0)),
            *(0 if second is None else second.stride(0), eps),
            UPDATE=update is not None,
            NORM=norm is not None,
            GATED=gated,
            NORMED=with_normed,
            ROWS=padded,
            COLUMNS=columns,
            BLOCK_K=block_k,
            WHOLE=k <= block_k,
            num_warps=4,
            **programmatic(x),
        )
    return out, stream, normed


def products_supports(x, update, norm, weight, second, eps, gated, with_normed) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    if x.shape[0] > MOST_ROWS:
        return f"it takes up to {MOST_ROWS} rows, there are {x.shape[0]}"
    return reason_against(x, update, norm, weight, second)


# ---- the norm of a stream -------------------------------------------------------------------------------------------


@triton.jit
def normed_row(x, p_norm, o_k, m_k, width, eps):
    """The norm of a row; columns beyond its width are 0."""
    scale = tl.load(p_norm + o_k, mask=m_k, other=0.0).to(tl.float32)
    return x * (1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)) * scale


@triton.jit
def add_norm_kernel(
    p_x,
    p_update,
    p_norm,
    p_stream,
    p_normed,
    width,
    stride_x,
    stride_update,
    eps,
    WIDTH: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One row of x + update, and its norm."""
    begin_dependent(PROGRAMMATIC)
    i_r = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, WIDTH)
    m_k = o_k < width
    dtype: tl.constexpr = p_x.dtype.element_ty
    x = tl.load(p_x + i_r * stride_x + o_k, mask=m_k, other=0.0).to(tl.float32)
    x += tl.load(p_update + i_r * stride_update + o_k, mask=m_k, other=0.0).to(tl.float32)
    x = cast(x, dtype)
    tl.store(p_stream + i_r * width + o_k, x, mask=m_k)
    normed = normed_row(x.to(tl.float32), p_norm, o_k, m_k, width, eps)
    tl.store(p_normed + i_r * width + o_k, cast(normed, dtype), mask=m_k)


def add_norm(x: Tensor, update: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``norm(x + update)`` and ``x + update``, see `layers.RMSNorm.beside`."""
    rows, width = x.shape
    stream, normed = x.new_empty(rows, width), x.new_empty(rows, width)
    if rows:
        launch(
            add_norm_kernel,
            (rows,),
            *(x, update, norm, stream, normed, width, x.stride(0), update.stride(0), eps),
            **whole_row(width),
            **programmatic(x),
        )
    return normed, stream


def add_norm_supports(x, update, norm, eps) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    return reason_against_rows(x.shape[1], x, update, norm)


# ---- what rows they take --------------------------------------------------------------------------------------------


def whole_row(width: int) -> dict[str, int]:
    """Options of a kernel in which a program has a whole row."""
    return {"WIDTH": triton.next_power_of_2(width), "num_warps": 4 if width <= 2048 else 8}


def reason_against_rows(width: int, x: Tensor, *others: Tensor | None) -> str | None:
    """Why a program cannot have a whole row of these, or None."""
    if width > MOST_WIDTH:
        return f"it takes rows of up to {MOST_WIDTH}, they are {width}"
    return reason_against(x, *others)


def reason_against(x: Tensor, *others: Tensor | None) -> str | None:
    """Why no kernel of `few` takes these together, or None."""
    tensors = [x, *(other for other in others if other is not None)]
    if x.dtype not in SINGLE_OR_HALF or any(other.dtype != x.dtype for other in tensors):
        return f"it takes one dtype of bf16, fp16 and fp32, got {', '.join(str(other.dtype) for other in tensors)}"
    if any(other.stride(-1) != 1 for other in tensors):
        return "it takes rows that are contiguous"
    return None
