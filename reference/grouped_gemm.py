"""Grouped matrix products: one product per expert over a ragged batch of rows, with the group sizes in a tensor."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dskernels.reference.fp8 import quantize
from dskernels.types import Fp8Tensor


def group_slices(offsets: Tensor, rows: int) -> list[slice]:
    """Rows of each group: ``offsets[e]`` to ``offsets[e + 1]``, read so that any values give disjoint slices of `rows`.

    Group 0 starts at row 0; ends are clamped into ``[0, rows]`` and never go back (a running maximum).
    """
    ends = offsets[1:].clamp(0, rows).cummax(0).values.tolist()
    return [slice(start, end) for start, end in pairwise([0, *ends])]


def grouped_gemm(
    a: Tensor | Fp8Tensor,
    b: Tensor | Fp8Tensor,
    offsets: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply each row with the weight of its group, ``out[r] = b[group(r)] @ a[r]``; rows without a group are zero.

    The experts' linear layers, DeepSeek-V3 report (arXiv 2412.19437) eq. 12, after the rows have been sorted by expert.
    """
    a_TK, b_ENK = _wide(a), _wide(b)
    groups = group_slices(offsets, a_TK.shape[0])
    products = [a_TK[rows] @ b_ENK[e].T for e, rows in enumerate(groups)]
    tail = a_TK.new_zeros(a_TK.shape[0] - groups[-1].stop, b_ENK.shape[1])
    return _deliver(torch.cat([*products, tail]), _out_dtype(a, out_dtype), out)


def grouped_gemm_masked(
    a: Tensor | Fp8Tensor,
    b: Tensor | Fp8Tensor,
    counts: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply the first ``counts[e]`` rows of each expert's buffer, ``out[e, m] = b[e] @ a[e, m]``; read no other.

    The layout of expert-parallel decoding, where every expert has a buffer of fixed height. Rows beyond the count are
    unspecified; here they are zero.
    """
    a_EMK, b_ENK = _wide(a), _wide(b)
    M = a_EMK.shape[1]
    products = []
    for e, count in enumerate(counts.clamp(0, M).tolist()):
        product = a_EMK[e, :count] @ b_ENK[e].T
        products.append(F.pad(product, (0, 0, 0, M - count)))
    return _deliver(torch.stack(products), _out_dtype(a, out_dtype), out)


def grouped_wgrad(
    dy: Tensor | Fp8Tensor,
    x: Tensor | Fp8Tensor,
    offsets: Tensor,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Weight gradient of each group, ``dw[e] = sum over the rows r of group e of outer(dy[r], x[r])``, in fp32.

    fp8 operands come from `quantize_grouped`: ``[N, P]`` and ``[K, P]``, each group in whole tiles of 128 columns.
    """
    if isinstance(dy, Fp8Tensor):
        dy_PN, x_PK = dy.dequantize().T, x.dequantize().T
        groups = padded_slices(offsets, dy_PN.shape[0])
    else:
        dy_PN, x_PK = _wide(dy), _wide(x)
        groups = group_slices(offsets, dy_PN.shape[0])
    dw_ENK = torch.stack([dy_PN[rows].T @ x_PK[rows] for rows in groups])
    if out is None:
        return dw_ENK
    for e, rows in enumerate(groups):
        if not accumulate:
            out[e] = dw_ENK[e]
        elif rows.stop > rows.start:
            out[e] += dw_ENK[e]
    return out


def quantize_grouped(x: Tensor, offsets: Tensor, *, scale_format: str = "fp32") -> Fp8Tensor:
    """Quantise ``x.T`` along the tokens of each group, for `grouped_wgrad`: no tile of 128 tokens holds two groups.

    Group ``e`` takes ``ceil(rows / 128)`` tiles of 128 columns, zeros after its last token; groups follow each other,
    and the width is ``128 * (ceil(T / 128) + E)`` whatever the offsets hold. The 1x128 tiles of report section 3.3.2.
    """
    T = x.shape[0]
    width = padded_width(T, offsets.shape[0] - 1)
    groups = group_slices(offsets, T)
    x_PK = torch.cat([F.pad(x[rows], (0, 0, 0, (rows.start - rows.stop) % 128)) for rows in groups])
    x_KP = F.pad(x_PK, (0, 0, 0, width - x_PK.shape[0])).T.contiguous()
    return quantize(x_KP, (1, 128), scale_format=scale_format)


def padded_width(rows: int, groups: int) -> int:
    """Columns that hold `rows` tokens in any division into `groups`, each padded to a multiple of 128."""
    return 128 * (-(-rows // 128) + groups)


def padded_slices(offsets: Tensor, width: int) -> list[slice]:
    """Columns of each group in the layout of `quantize_grouped`."""
    slices, start = [], 0
    for rows in group_slices(offsets, width):
        stop = min(start + 128 * (-(-(rows.stop - rows.start) // 128)), width)
        slices.append(slice(start, stop))
        start = stop
    return slices


def _wide(x: Tensor | Fp8Tensor) -> Tensor:
    """The values in fp32 (fp64 stays)."""
    if isinstance(x, Fp8Tensor):
        return x.dequantize()
    return x if x.dtype == torch.float64 else x.float()


def _out_dtype(a: Tensor | Fp8Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    return out_dtype or (torch.bfloat16 if isinstance(a, Fp8Tensor) else a.dtype)


def _deliver(result: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    return result.to(dtype) if out is None else out.copy_(result)
