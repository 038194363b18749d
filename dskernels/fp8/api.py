"""Public quantising operations: e4m3 values with one fp32 scale a tile."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from dskernels.dispatch import Operation
from dskernels.fp8.layout import empty_quantized
from dskernels.reference import fp8 as reference
from dskernels.types import Block, Fp8Tensor
from dskernels.validate import HALF_OR_SINGLE, check_choice, check_float, check_tensor

BLOCKS: tuple[Block, ...] = ((1, 128), (128, 128), (128, 1))
SCALE_FORMATS = ("fp32", "ue8m0")


def quantize(
    x: Tensor,
    block: Block = (1, 128),
    *,
    scale_format: str = "fp32",
    transpose: bool = False,
    impl: str | None = None,
) -> Fp8Tensor:
    """Quantise a matrix to e4m3 with one scale a tile.

    scale = max|tile| / 448, at least 2^-126, and 1 for a tile of zeros; q = round-to-nearest-even(x / scale) with IEEE
    division, clamped to +-448. All implementations return the same bytes.

    Args:
        x: bf16, fp16 or fp32 ``[rows, cols]``, any sizes (the last tiles may be partial), last dimension contiguous; or
            ``[E, rows, cols]``, a stack of expert weights, with ``block=(128, 128)``.
        block: rows and columns of a tile: ``(1, 128)`` for activations, ``(128, 128)`` for weights, ``(128, 1)`` along
            tokens.
        scale_format: ``"fp32"``, or ``"ue8m0"``: scales rounded up to powers of two, stored as fp32.
        transpose: return x.T, contiguous, with block and scale transposed: ``quantize(x, (128, 1), transpose=True)`` is
            the operand of Wgrad.
        impl: implementation to run, see :mod:`dskernels.dispatch`.

    Returns:
        Fp8Tensor: data e4m3 ``[rows, cols]``, scale fp32 ``[ceil(rows / block[0]), ceil(cols / block[1])]``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, stride, block or format that is not one of the above.

    A NaN or infinity makes its whole tile NaN on dequantising. An empty matrix gives an empty result.
    Source: DeepSeek-V3 report (arXiv 2412.19437), section 3.3.2.
    """
    check_choice("block", block, BLOCKS)
    check_choice("scale_format", scale_format, SCALE_FORMATS)
    stacked = isinstance(x, Tensor) and x.dim() == 3 and block == (128, 128)
    check_tensor("x", x, dtype=HALF_OR_SINGLE, shape=("E", "rows", "cols") if stacked else ("rows", "cols"))
    data, scale = _quantize(x, *block, scale_format == "ue8m0", transpose, impl=impl)
    return Fp8Tensor(data, scale, (block[1], block[0]) if transpose else block)


def quantize_both(x: Tensor, *, scale_format: str = "fp32", impl: str | None = None) -> tuple[Fp8Tensor, Fp8Tensor]:
    """Quantise a gradient for Dgrad and for Wgrad in one pass over it.

    The same as ``quantize(x)`` and ``quantize(x, (128, 1), transpose=True)``, reading `x` once.

    Args:
        x: bf16, fp16 or fp32 ``[T, N]``, last dimension contiguous.
        scale_format: ``"fp32"`` or ``"ue8m0"``, see :func:`quantize`.
        impl: implementation to run, see :mod:`dskernels.dispatch`.

    Returns:
        Fp8Tensor of x ``[T, N]`` and Fp8Tensor of x.T ``[N, T]``, both in 1x128 tiles.

    Raises:
        TypeError, ValueError: as :func:`quantize`.

    Source: DeepSeek-V3 report, section 3.3.2 and figure 6.
    """
    check_choice("scale_format", scale_format, SCALE_FORMATS)
    check_tensor("x", x, dtype=HALF_OR_SINGLE, shape=("T", "N"))
    data, scale, data_t, scale_t = _quantize_both(x, scale_format == "ue8m0", impl=impl)
    return Fp8Tensor(data, scale), Fp8Tensor(data_t, scale_t)


def swiglu_quantize(gate_up: Tensor, *, scale_format: str = "fp32", impl: str | None = None) -> Fp8Tensor:
    """Quantise silu(gate) * up in 1x128 tiles, without writing the product out.

    Args:
        gate_up: bf16, fp16 or fp32 ``[T, 2 * I]``, gate in the first I columns, up in the last I.
        scale_format: ``"fp32"`` or ``"ue8m0"``, see :func:`quantize`.
        impl: implementation to run, see :mod:`dskernels.dispatch`.

    Returns:
        Fp8Tensor ``[T, I]``. The product is formed in fp32 and not rounded before quantising. Against the reference
        (another exponential) data agrees within one e4m3 step and scale within 2 ulp.

    Raises:
        TypeError, ValueError: as :func:`quantize`, and ValueError for an odd number of columns.

    Source: Shazeer, arXiv 2002.05202; DeepSeek-V3 report, section 3.3.3.
    """
    check_choice("scale_format", scale_format, SCALE_FORMATS)
    check_tensor("gate_up", gate_up, dtype=HALF_OR_SINGLE, shape=("T", "2 * I"))
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected an even number of columns, got {list(gate_up.shape)}")
    return Fp8Tensor(*_swiglu_quantize(gate_up, scale_format == "ue8m0", impl=impl))


@overload
def rmsnorm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: None = None, *, scale_format: str = ..., impl: str | None = ...
) -> Fp8Tensor: ...
@overload
def rmsnorm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor, *, scale_format: str = ..., impl: str | None = ...
) -> tuple[Fp8Tensor, Tensor]: ...
def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    *,
    scale_format: str = "fp32",
    impl: str | None = None,
) -> Fp8Tensor | tuple[Fp8Tensor, Tensor]:
    """Normalise and quantise in 1x128 tiles: x / sqrt(mean(x^2) + eps) * weight, of x + residual if that is given.

    Args:
        x: bf16, fp16 or fp32 ``[T, H]``.
        weight: bf16, fp16 or fp32 ``[H]``.
        eps: added to the mean square.
        residual: the residual stream, like `x`; the sum is rounded to x's dtype before it is normalised.
        scale_format: ``"fp32"`` or ``"ue8m0"``, see :func:`quantize`.
        impl: implementation to run, see :mod:`dskernels.dispatch`.

    Returns:
        Fp8Tensor ``[T, H]``; with `residual`, that and the new residual stream ``x + residual``. Against the reference
        (another order of the sum) data agrees within one e4m3 step and scale within 2 ulp.

    Raises:
        TypeError, ValueError: as :func:`quantize`, and ValueError where `weight` or `residual` does not fit `x`.

    Source: Zhang and Sennrich, arXiv 1910.07467, eq. 4; DeepSeek-V3 report, section 3.3.
    """
    check_choice("scale_format", scale_format, SCALE_FORMATS)
    check_tensor("x", x, dtype=HALF_OR_SINGLE, shape=("T", "H"))
    check_tensor("weight", weight, dtype=HALF_OR_SINGLE, shape=(x.shape[1],), like=x)
    check_float("eps", eps)
    if residual is not None:
        check_tensor("residual", residual, dtype=x.dtype, shape=tuple(x.shape), like=x)
    data, scale, total = _rmsnorm_quantize(x, weight, eps, residual, scale_format == "ue8m0", impl=impl)
    return Fp8Tensor(data, scale) if residual is None else (Fp8Tensor(data, scale), total)


# ---- registration: flat arguments in, flat tensors out --------------------------------------------------------------


def _format(ue8m0: bool) -> str:
    return "ue8m0" if ue8m0 else "fp32"


def _quantize_reference(x: Tensor, rows: int, cols: int, ue8m0: bool, transpose: bool) -> tuple[Tensor, Tensor]:
    return reference.quantize(x, (rows, cols), scale_format=_format(ue8m0), transpose=transpose)[:2]


def _quantize_both_reference(x: Tensor, ue8m0: bool) -> tuple[Tensor, ...]:
    by_row, by_column = reference.quantize_both(x, scale_format=_format(ue8m0))
    return *by_row[:2], *by_column[:2]


def _rmsnorm_quantize_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, ue8m0: bool
) -> tuple[Tensor, Tensor, Tensor]:
    result = reference.rmsnorm_quantize(x, weight, eps, residual, scale_format=_format(ue8m0))
    return (*result[:2], x.new_empty(0, x.shape[1])) if residual is None else (*result[0][:2], result[1])


_quantize = Operation(
    "quantize(Tensor x, int block_rows, int block_cols, bool ue8m0, bool transpose) -> (Tensor, Tensor)",
    reference=_quantize_reference,
    triton="dskernels.fp8.triton:quantize",
    fake=lambda x, rows, cols, ue8m0, transpose: empty_quantized(x, (rows, cols), transpose),
)
_quantize_both = Operation(
    "quantize_both(Tensor x, bool ue8m0) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_quantize_both_reference,
    triton="dskernels.fp8.triton:quantize_both",
    fake=lambda x, ue8m0: (*empty_quantized(x, (1, 128)), *empty_quantized(x, (128, 1), transpose=True)),
)
_swiglu_quantize = Operation(
    "swiglu_quantize(Tensor gate_up, bool ue8m0) -> (Tensor, Tensor)",
    reference=lambda gate_up, ue8m0: reference.swiglu_quantize(gate_up, scale_format=_format(ue8m0))[:2],
    triton="dskernels.fp8.triton:swiglu_quantize",
    fake=lambda gate_up, ue8m0: empty_quantized(gate_up[:, : gate_up.shape[1] // 2], (1, 128)),
)
_rmsnorm_quantize = Operation(
    "rmsnorm_quantize(Tensor x, Tensor weight, float eps, Tensor? residual, bool ue8m0) -> (Tensor, Tensor, Tensor)",
    reference=_rmsnorm_quantize_reference,
    triton="dskernels.fp8.triton:rmsnorm_quantize",
    fake=lambda x, weight, eps, residual, ue8m0: (
        *empty_quantized(x, (1, 128)),
        x.new_empty(0, x.shape[1]) if residual is None else torch.empty_like(x),
    ),
)
