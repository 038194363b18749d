"""Portable Triton kernels for what a dispatch brought: tokens are dequantised, and choices of local experts picked out.

Names: `p_` pointer, `i_` index of a program, `o_` offsets, `m_` mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.portable import INTERPRETED, cast, launch, reason_against_e4m3
from dskernels.validate import ceil_div

COLUMNS = 2048  # columns of a row that one program dequantises
CHOICES = 1024  # choices that one program renumbers


@triton.jit(do_not_specialize=["stride_exponents"])
def unload_kernel(p_data, p_exponents, p_out, columns, stride_data, stride_exponents, COLUMNS: tl.constexpr):
    """Dequantise part of a row: e4m3 times a power of two, whose biased exponent is a byte for each 128 columns."""
    i_r = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < columns
    x = tl.load(p_data + i_r * stride_data + o_c, mask=m_c, other=0.0).to(tl.float32)
    exponent = tl.load(p_exponents + i_r * stride_exponents + o_c // 128, mask=m_c, other=0).to(tl.int32)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(p_out + i_r * columns + o_c, cast(x * scale, p_out.dtype.element_ty), mask=m_c)


def unload(data: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantises tokens: ``data * 2 ** (exponents - 127)``, in `dtype`.

    8,192 rows of 7,168 columns take 49 us on an H200. A whole dispatch took 202 us with this kernel at its end, and 756
    with plain PyTorch there.

    Args:
        data: e4m3 ``[R, H]``, whose rows may lie apart; as `unload_supports` requires.
        exponents: uint8 ``[R, ceil(H / 128)]``, biased exponents of the scales; rows may lie apart, too.
        dtype: of the result ``[R, H]``.
    """
    rows, columns = data.shape
    out = data.new_empty((rows, columns), dtype=dtype)
    if out.numel():
        grid = (rows, ceil_div(columns, COLUMNS))
        launch(
            unload_kernel, grid, data, exponents, out, columns, data.stride(0), exponents.stride(0), COLUMNS=COLUMNS,
            num_warps=8,
        )  # fmt: skip
    return out


def unload_supports(data: Tensor) -> str | None:
    """Why the kernel does not take this tensor, or None if it does."""
    if not (data.is_cuda or INTERPRETED.value):
        return "it is not on a GPU"
    return reason_against_e4m3(data.device)


@triton.jit(do_not_specialize=["size", "stride_weights", "stride_experts", "first", "n"])
def choices_kernel(
    p_weights,
    p_experts,
    p_weights_out,
    p_experts_out,
    size,
    k,
    stride_weights,
    stride_experts,
    first,
    n,
    CHOICES: tl.constexpr,
):
    """Copy weights, and ids counted from `first`; -1 for ids outside of the `n` from `first` on."""
    o_i = tl.program_id(0) * CHOICES + tl.arange(0, CHOICES)
    m_i = o_i < size
    row, column = (o_i // k).to(tl.int64), o_i % k
    tl.store(p_weights_out + o_i, tl.load(p_weights + row * stride_weights + column, mask=m_i, other=0.0), mask=m_i)
    expert = tl.load(p_experts + row * stride_experts + column, mask=m_i, other=-1) - first
    tl.store(p_experts_out + o_i, tl.where((expert >= 0) & (expert < n), expert, -1), mask=m_i)


def choices(weights: Tensor, experts: Tensor, first: int, n: int) -> tuple[Tensor, Tensor]:
    """The choices of the n experts from `first` on, numbered from 0; ids of other experts become -1.

    Args:
        weights: fp32 ``[R, k]``, whose rows may lie apart.
        experts: int32 ``[R, k]``, likewise.
        first: id of the first expert.
        n: number of experts.

    Returns:
        Contiguous weights and ids ``[R, k]``.
    """
    rows, k = weights.shape
    found = weights.new_empty((rows, k)), experts.new_empty((rows, k))
    if not (weights.is_cuda or INTERPRETED.value):
        ids = experts - first
        found[0].copy_(weights)
        found[1].copy_(torch.where((ids >= 0) & (ids < n), ids, -1))
    elif rows * k:
        launch(
            choices_kernel, (ceil_div(rows * k, CHOICES),), weights, experts, *found,
            rows * k, k, weights.stride(0), experts.stride(0), first, n, CHOICES=CHOICES, num_warps=4,
        )  # fmt: skip
    return found
