"""Portable Triton kernels that write rows directly into the memory of other GPUs of the host, and add up what arrives.

torch's symmetric memory maps the memory of the other GPUs.

Names: `p_` pointer, `i_` index of a program, `o_` offsets, `m_` mask. A word is 4 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.portable import INTERPRETED, cast, launch
from dskernels.validate import ceil_div

BLOCK = 2048  # words that a program has in flight: 8 KB


@triton.jit
def put_kernel(
    p_rows,
    p_needed,
    p_peers,
    slot,
    width,
    head,
    rows_of_rank,
    stride_row,
    stride_needed_token,
    stride_needed_rank,
    BLOCK: tl.constexpr,
):
    """Write one row to its slot on one rank: all of it if it is needed there, otherwise only its first `head` words."""
    i_t = tl.program_id(0).to(tl.int64)
    i_r = tl.program_id(1).to(tl.int64)
    needed = tl.load(p_needed + i_t * stride_needed_token + i_r * stride_needed_rank)
    # Rows are aligned to 16 bytes and a multiple of that long, which an address cast from an integer does not say:
    # without the hints, 4 bytes are written at a time.
    words = tl.multiple_of(tl.where(needed != 0, width, head), 4)
    p_row = p_rows + (i_r * rows_of_rank + i_t) * stride_row
    p_slot = tl.load(p_peers + i_r).to(tl.pointer_type(tl.int32)) + (slot + i_t) * width
    p_row, p_slot = tl.multiple_of(p_row, 16), tl.multiple_of(p_slot, 16)
    for first in range(0, words, BLOCK):
        o_w = first + tl.arange(0, BLOCK)
        m_w = o_w < words
        tl.store(p_slot + o_w, tl.load(p_row + o_w, mask=m_w, other=0), mask=m_w)


def put(rows: Tensor, needed: Tensor, peers: Tensor, *, slot: int, head: int, rows_of_rank: int) -> None:
    """Writes rows to the slots of every rank.

    Args:
        rows: int32 ``[., W]``; the row of token t for rank r is ``r * rows_of_rank + t``.
        needed: bool or uint8 ``[T, R]``, any strides: which ranks get the whole row of a token.
        peers: int64 ``[R]`` on the device, the address of each rank's slots, int32 ``[., W]``.
        slot: the slot of the first token, the same on every rank; the others follow.
        head: number of words at the beginning of a row that every rank gets.
        rows_of_rank: number of rows for each rank; 0 if all ranks get the same rows.
    """
    tokens, ranks = needed.shape
    if tokens == 0:
        return
    launch(
        put_kernel,
        (tokens, ranks),
        rows,
        needed,
        peers,
        slot,
        rows.shape[1],
        head,
        rows_of_rank,
        rows.stride(0),
        needed.stride(0),
        needed.stride(1),
        BLOCK=BLOCK,
        num_warps=8,
    )


SUM_BLOCK = 2048  # elements of a program


@triton.jit
def _plus(total, p_part, o, m):
    """Add elements of one more tensor, in fp32."""
    return total + tl.load(p_part + o, mask=m, other=0).to(tl.float32)


@triton.jit
def sum_kernel(p_out, p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7, p_8, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the elementwise sum of PARTS (1 to 9) tensors in fp32, in their order, rounded once."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    total = tl.load(p_0 + o, mask=m, other=0).to(tl.float32)
    if PARTS > 1:
        total = _plus(total, p_1, o, m)
    if PARTS > 2:
        total = _plus(total, p_2, o, m)
    if PARTS > 3:
        total = _plus(total, p_3, o, m)
    if PARTS > 4:
        total = _plus(total, p_4, o, m)
    if PARTS > 5:
        total = _plus(total, p_5, o, m)
    if PARTS > 6:
        total = _plus(total, p_6, o, m)
    if PARTS > 7:
        total = _plus(total, p_7, o, m)
    if PARTS > 8:
        total = _plus(total, p_8, o, m)
    tl.store(p_out + o, cast(total, p_out.dtype.element_ty), mask=m)


def sum_ranks(parts: Sequence[Tensor], *, out: Tensor) -> None:
    """Writes the elementwise sum of tensors to `out`; it is computed in fp32, in their order, and rounded once.

    Args:
        parts: contiguous tensors of the shape and dtype of `out`.
        out: contiguous.
    """
    if out.numel() == 0:
        return
    if len(parts) > 9 or not (out.is_cuda or INTERPRETED.value):
        total = torch.zeros(out.shape, device=out.device)
        for part in parts:
            total += part
        out.copy_(total)
        return
    nine = [*parts, *[parts[0]] * (9 - len(parts))]
    grid = (ceil_div(out.numel(), SUM_BLOCK),)
    launch(sum_kernel, grid, out, *nine, out.numel(), PARTS=len(parts), BLOCK=SUM_BLOCK, num_warps=8)
