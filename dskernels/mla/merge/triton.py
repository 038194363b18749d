"""Portable Triton kernels that merge two states of attention, and the gradient of this.

A program takes a few rows; row r of [..., Q, H] is head r % H of query (r // H) % Q, and its log-sum-exp is at
[..., H, Q].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.portable import cast, launch
from dskernels.validate import ceil_div

ELEMENTS = 2048  # elements of one state that a program holds


@triton.jit
def load_lse(p_lse, o_lse, m_row):
    """Log-sum-exp of rows, with +inf (nothing seen, in the convention of some kernels) converted to -inf."""
    lse = tl.load(p_lse + o_lse, mask=m_row, other=float("-inf"))
    return tl.where(lse == float("inf"), float("-inf"), lse)


@triton.jit
def load_out(p_out, row, w, m_row, VALUE: tl.constexpr, BLOCK_V: tl.constexpr):
    """Rows of a state in fp32; zero instead of the stored values if the state has no weight."""
    o_v = tl.arange(0, BLOCK_V)
    mask = (m_row & (w != 0))[:, None] & (o_v < VALUE)[None, :]
    return tl.load(p_out + row[:, None] * VALUE + o_v[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def shares(a, b):
    """(lse, weight of a, weight of b): the weights sum to 1, or are 0 if both states saw nothing."""
    largest = tl.maximum(a, b)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    e_a = tl.exp(a - base)
    e_b = tl.exp(b - base)
    total = e_a + e_b
    divisor = tl.where(total == 0, 1.0, total)
    lse = tl.where(total == 0, float("-inf"), base + tl.log(divisor))
    return lse, e_a / divisor, e_b / divisor


@triton.jit
def rows_of_program(rows, queries, heads, BLOCK_R: tl.constexpr):
    """(row, offset of its log-sum-exp, mask) for the rows of this program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_lse = (row // heads // queries * heads + row % heads) * queries + row // heads % queries
    return row, o_lse, row < rows


@triton.jit(do_not_specialize=["rows", "queries"])
def merge_kernel(
    p_out_a,
    p_lse_a,
    p_out_b,
    p_lse_b,
    p_out,
    p_lse,
    rows,
    queries,
    heads,
    VALUE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Rows of the merged state."""
    row, o_lse, m_row = rows_of_program(rows, queries, heads, BLOCK_R)
    lse, w_a, w_b = shares(load_lse(p_lse_a, o_lse, m_row), load_lse(p_lse_b, o_lse, m_row))
    # [BLOCK_R, BLOCK_V]
    a = load_out(p_out_a, row, w_a, m_row, VALUE, BLOCK_V)
    b = load_out(p_out_b, row, w_b, m_row, VALUE, BLOCK_V)
    out = w_a[:, None] * a + w_b[:, None] * b
    o_v = tl.arange(0, BLOCK_V)
    m_out = m_row[:, None] & (o_v < VALUE)[None, :]
    tl.store(p_out + row[:, None] * VALUE + o_v[None, :], cast(out, p_out.dtype.element_ty), mask=m_out)
    tl.store(p_lse + o_lse, lse, mask=m_row)


@triton.jit(do_not_specialize=["rows", "queries"])
def merge_backward_kernel(
    p_dout,
    p_dlse,
    p_out_a,
    p_lse_a,
    p_out_b,
    p_lse_b,
    p_dout_a,
    p_dlse_a,
    p_dout_b,
    p_dlse_b,
    rows,
    queries,
    heads,
    VALUE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Rows of the four gradients: d out_a = w_a dout, and d lse_a = w_a (dout . (out_a - out) + dlse); b is
    analogous."""
    row, o_lse, m_row = rows_of_program(rows, queries, heads, BLOCK_R)
    _, w_a, w_b = shares(load_lse(p_lse_a, o_lse, m_row), load_lse(p_lse_b, o_lse, m_row))
    a = load_out(p_out_a, row, w_a, m_row, VALUE, BLOCK_V)
    b = load_out(p_out_b, row, w_b, m_row, VALUE, BLOCK_V)
    o_v = tl.arange(0, BLOCK_V)
    o_out = row[:, None] * VALUE + o_v[None, :]
    m_out = m_row[:, None] & (o_v < VALUE)[None, :]
    dout = tl.load(p_dout + o_out, mask=m_out, other=0.0).to(tl.float32)
    dlse = tl.load(p_dlse + o_lse, mask=m_row, other=0.0)

    # dout . (a - out) = w_b dout . (a - b), and vice versa.
    apart = tl.sum(dout * (a - b), axis=1)
    dlse_a = tl.where(w_a == 0, 0.0, w_a * (w_b * apart + dlse))
    dlse_b = tl.where(w_b == 0, 0.0, w_b * (dlse - w_a * apart))
    dtype: tl.constexpr = p_dout_a.dtype.element_ty
    tl.store(p_dout_a + o_out, cast(w_a[:, None] * dout, dtype), mask=m_out)
    tl.store(p_dout_b + o_out, cast(w_b[:, None] * dout, dtype), mask=m_out)
    tl.store(p_dlse_a + o_lse, dlse_a, mask=m_row)
    tl.store(p_dlse_b + o_lse, dlse_b, mask=m_row)


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merged out [..., Q, H, V] and lse [..., H, Q]."""
    inputs = [x.contiguous() for x in (out_a, lse_a, out_b, lse_b)]
    results = inputs[0].new_empty(out_a.shape), inputs[1].new_empty(lse_a.shape)
    _launch(merge_kernel, inputs, results, out_a)
    return results


def merge_onto(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Merge the second state into the first, all of them contiguous."""
    _launch(merge_kernel, (out_a, lse_a, out_b, lse_b), (out_a, lse_a), out_a)


def merge_states_backward(
    dout: Tensor, dlse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of out_a, lse_a, out_b, lse_b."""
    inputs = [x.contiguous() for x in (dout, dlse, out_a, lse_a, out_b, lse_b)]
    results = tuple(torch.empty_like(x) for x in inputs[2:])
    _launch(merge_backward_kernel, inputs, results, out_a)
    return results


def _launch(kernel, inputs, results, out: Tensor) -> None:
    *_, queries, heads, value = out.shape
    if out.numel() == 0:
        return
    rows = out.numel() // value
    block_v = triton.next_power_of_2(value)
    block_r = max(1, ELEMENTS // block_v)
    constants = {"VALUE": value, "BLOCK_V": block_v, "BLOCK_R": block_r, "num_warps": 4}
    launch(kernel, (ceil_div(rows, block_r),), *inputs, *results, rows, queries, heads, **constants)


def merge_states_supports(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    return "float64 runs on the reference only" if out_a.dtype == torch.float64 else None


def merge_states_backward_supports(
    dout: Tensor, dlse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    return merge_states_supports(out_a, lse_a, out_b, lse_b)
