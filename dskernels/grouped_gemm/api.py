"""Public grouped matrix products, and the quantisation of operands of the weight gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dskernels.dispatch import Operation
from dskernels.fp8.api import SCALE_FORMATS
from dskernels.fp8.layout import empty_scale
from dskernels.grouped_gemm.config import padded_width
from dskernels.reference.grouped_gemm import grouped_gemm as reference_gemm
from dskernels.reference.grouped_gemm import grouped_gemm_masked as reference_masked
from dskernels.reference.grouped_gemm import grouped_wgrad as reference_wgrad
from dskernels.reference.grouped_gemm import quantize_grouped as reference_quantize
from dskernels.repeated import repeated
from dskernels.types import Fp8Tensor
from dskernels.validate import HALF_OR_SINGLE, check_bool, check_choice, check_fp8, check_tensor, check_written


@repeated
def grouped_gemm(
    a: Tensor | Fp8Tensor,
    b: Tensor | Fp8Tensor,
    offsets: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Multiply each row of a ragged batch with the matrix of its group: ``out[r] = b[e] @ a[r]``.

    Row r belongs to group e if ``offsets[e] <= r < offsets[e + 1]``. Products are summed in fp32; for e4m3, each 128
    along K are summed separately and then added in fp32, as in :func:`dskernels.fp8_gemm`. The last dimension of every
    tensor is contiguous.

    Args:
        a: ``[T, K]``, rows sorted by group, T >= 0; bf16, fp16 or fp32, or an `Fp8Tensor` in 1x128 tiles.
        b: ``[E, N, K]``, E >= 1, in the dtype of `a`; or a stacked `Fp8Tensor` in 128x128 blocks, its scale
            ``[E, ceil(N / 128), ceil(K / 128)]``.
        offsets: int32 ``[E + 1]`` on the device: 0, then the end of each group. Groups may be empty. It is never read
            on the host. Values are clamped to [0, T], and a value that is less than an earlier one is replaced by that
            one, so no value leads out of bounds.
        out_dtype: bf16, fp16 or fp32; by default that of `a`, bf16 for e4m3; ignored if `out` is given.
        out: ``[T, N]`` bf16, fp16 or fp32 to write to, last dimension contiguous; not allowed if a gradient is needed.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        ``[T, N]``; `out` itself if it is given. Rows from ``offsets[E]`` on are zero, and those rows of `a` are not
        read.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, tiles, strides or devices do not fit, or `out` is given although a gradient is needed.

    Differentiable in `a` and `b` unless they are e4m3: da is a grouped product with b transposed, and db is computed by
    :func:`grouped_wgrad`. T = 0 gives an empty result, K = 0 gives zeros.
    Source: DeepSeek-V3 report (arXiv 2412.19437), eq. 12 and section 3.3.2.
    """
    _check_operands(a, b, stacked_a=False)
    a_data, a_scale = _flat(a)
    b_data, b_scale = _flat(b)
    check_tensor("offsets", offsets, dtype=torch.int32, shape=(b_data.shape[0] + 1,), like=a_data)
    if out is None:
        dtype = _out_dtype(a, out_dtype)
        return _grouped_gemm(a_data, a_scale, b_data, b_scale, offsets, dtype, impl=impl)
    check_tensor("out", out, dtype=HALF_OR_SINGLE, shape=(a_data.shape[0], b_data.shape[1]), like=a_data)
    check_written("out", out)
    _check_no_gradient("out: expected None where a gradient is needed", a_data, b_data)
    _grouped_gemm_out(a_data, a_scale, b_data, b_scale, offsets, out, impl=impl)
    return out


@repeated
def grouped_gemm_masked(
    a: Tensor | Fp8Tensor,
    b: Tensor | Fp8Tensor,
    counts: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Multiply the first ``counts[e]`` rows of each group's buffer with its matrix: ``out[e, m] = b[e] @ a[e, m]``.

    This is the layout of expert-parallel decoding: every expert has a buffer of M rows, and only the device knows how
    many of them have arrived. The last dimension of every tensor is contiguous.

    Args:
        a: ``[E, M, K]``, M >= 0; bf16, fp16 or fp32, or an `Fp8Tensor` in 1x128 tiles, its scale
            ``[E, M, ceil(K / 128)]`` with the row index contiguous: quantise it as ``[E * M, K]``, then view data and
            scale as stacks.
        b: ``[E, N, K]``, E >= 1, in the dtype of `a`; or a stacked `Fp8Tensor` in 128x128 blocks.
        counts: int32 ``[E]`` on the device; values are clamped to [0, M].
        out_dtype: bf16, fp16 or fp32; by default that of `a`, bf16 for e4m3; ignored if `out` is given.
        out: ``[E, M, N]`` bf16, fp16 or fp32 to write to, last dimension contiguous.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        ``[E, M, N]``; `out` itself if it is given. Rows beyond the count are unspecified, and those rows of `a` are not
        read.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, tiles, strides or devices do not fit, or a gradient is needed: there is none.

    M = 0 gives an empty result, K = 0 gives zeros in the rows below the counts.
    Source: DeepSeek-V3 report (arXiv 2412.19437), section 3.4.2.
    """
    _check_operands(a, b, stacked_a=True)
    a_data, a_scale = _flat(a)
    b_data, b_scale = _flat(b)
    shape = (*a_data.shape[:2], b_data.shape[1])
    check_tensor("counts", counts, dtype=torch.int32, shape=shape[:1], like=a_data)
    _check_no_gradient("a, b: grouped_gemm_masked has no gradient, call it under torch.no_grad()", a_data, b_data)
    if out is None:
        out = a_data.new_empty(shape, dtype=_out_dtype(a, out_dtype))
    else:
        check_tensor("out", out, dtype=HALF_OR_SINGLE, shape=shape, like=a_data)
        check_written("out", out)
    _grouped_gemm_masked(a_data, a_scale, b_data, b_scale, counts, out, impl=impl)
    return out


@repeated
def grouped_wgrad(
    dy: Tensor | Fp8Tensor,
    x: Tensor | Fp8Tensor,
    offsets: Tensor,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Sum the outer products of each group's tokens, in fp32: ``dw[e] = dy[rows of e].T @ x[rows of e]``.

    This is the weight gradient of :func:`grouped_gemm`. Rows that belong to no group are not read. The last dimension
    of every tensor is contiguous.

    Args:
        dy: ``[T, N]`` bf16, fp16 or fp32; or an `Fp8Tensor` ``[N, P]`` from :func:`quantize_grouped`.
        x: ``[T, K]`` in the dtype of `dy`; or an `Fp8Tensor` ``[K, P]`` from :func:`quantize_grouped`.
        offsets: int32 ``[E + 1]`` on the device, the end of each group, in tokens, also for e4m3; any values are safe,
            as in :func:`grouped_gemm`.
        out: fp32 ``[E, N, K]`` to write to, last dimension contiguous.
        accumulate: add to `out` instead of overwriting it.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        fp32 ``[E, N, K]``; `out` itself if it is given. The part of a group without tokens is zero; with `accumulate`,
        it is neither read nor written.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, tiles, strides or devices do not fit, `accumulate` is given without `out`, or a gradient is
            needed: there is none.

    Source: DeepSeek-V3 report (arXiv 2412.19437), figure 6 and section 3.3.2.
    """
    if isinstance(dy, Fp8Tensor):
        check_fp8("dy", dy, blocks=[(1, 128)])
        check_fp8("x", x, blocks=[(1, 128)], like=dy.data)
        (n, tokens), (k, tokens_x) = dy.shape, x.shape
        if tokens % 128:
            raise ValueError(f"dy: expected a multiple of 128 columns, as quantize_grouped() makes it, got {tokens}")
        if tokens_x != tokens:
            raise ValueError(f"x: expected {tokens} columns like dy, got {tokens_x}")
    else:
        check_tensor("dy", dy, dtype=HALF_OR_SINGLE, shape=("T", "N"))
        check_tensor("x", x, dtype=dy.dtype, shape=(dy.shape[0], "K"), like=dy)
        n, k = dy.shape[1], x.shape[1]
    dy_data, dy_scale = _flat(dy)
    x_data, x_scale = _flat(x)
    _check_offsets(offsets, dy_data)
    check_bool("accumulate", accumulate)
    _check_no_gradient("dy, x: grouped_wgrad has no gradient, call it under torch.no_grad()", dy_data, x_data)
    shape = (offsets.shape[0] - 1, n, k)
    if out is None:
        if accumulate:
            raise ValueError("accumulate: expected `out` to add to, got out=None")
        out = dy_data.new_empty(shape, dtype=torch.float32)
    else:
        check_tensor("out", out, dtype=torch.float32, shape=shape, like=dy_data)
        check_written("out", out)
    _grouped_wgrad(dy_data, dy_scale, x_data, x_scale, offsets, out, accumulate, impl=impl)
    return out


@repeated
def quantize_grouped(x: Tensor, offsets: Tensor, *, scale_format: str = "fp32", impl: str | None = None) -> Fp8Tensor:
    """Quantise ``x.T`` along the tokens of each group, to make an operand of :func:`grouped_wgrad`.

    The tokens of a group fill ``ceil(size / 128)`` tiles of 128 columns, with zeros after the last token; the tiles of
    the groups follow each other without gaps. All implementations return the same bytes.

    Args:
        x: bf16, fp16 or fp32 ``[T, K]``, last dimension contiguous.
        offsets: int32 ``[E + 1]`` on the device, the end of each group; any values are safe, as in
            :func:`grouped_gemm`.
        scale_format: ``"fp32"`` or ``"ue8m0"``, see :func:`dskernels.quantize`.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        Fp8Tensor ``[K, P]`` in 1x128 tiles, ``P = 128 * (ceil(T / 128) + E)``, which is enough for any offsets. Columns
        without a token are zero, and tiles without a token have scale 1. Rows of `x` that belong to no group are not
        read.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, stride, device or format does not fit.

    Source: DeepSeek-V3 report (arXiv 2412.19437), section 3.3.2.
    """
    check_choice("scale_format", scale_format, SCALE_FORMATS)
    check_tensor("x", x, dtype=HALF_OR_SINGLE, shape=("T", "K"))
    _check_offsets(offsets, x)
    return Fp8Tensor(*_quantize_grouped(x, offsets, scale_format == "ue8m0", impl=impl))


def _check_operands(a: Any, b: Any, *, stacked_a: bool) -> None:
    shape = ("E", "M", "K") if stacked_a else ("T", "K")
    if isinstance(a, Fp8Tensor):
        check_fp8("a", a, blocks=[(1, 128)], ndim=len(shape))
        check_fp8("b", b, blocks=[(128, 128)], ndim=3, like=a.data)
    else:
        check_tensor("a", a, dtype=HALF_OR_SINGLE, shape=shape)
        check_tensor("b", b, dtype=a.dtype, shape=("E", "N", "K"), like=a)
    if b.shape[0] == 0:
        raise ValueError(f"b: expected shape [E, N, K] with E >= 1, got {list(b.shape)}")
    if b.shape[2] != a.shape[-1]:
        raise ValueError(f"b: expected K = {a.shape[-1]} columns like a, got {b.shape[2]}")
    if stacked_a and b.shape[0] != a.shape[0]:
        raise ValueError(f"b: expected E = {a.shape[0]} matrices like a, got {b.shape[0]}")


def _check_offsets(offsets: Any, like: Tensor) -> None:
    check_tensor("offsets", offsets, dtype=torch.int32, shape=("E + 1",), like=like)
    if offsets.shape[0] < 2:
        raise ValueError(f"offsets: expected shape [E + 1] with E >= 1, got {list(offsets.shape)}")


def _check_no_gradient(message: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(message)


def _out_dtype(a: Tensor | Fp8Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    if out_dtype is None:
        return torch.bfloat16 if isinstance(a, Fp8Tensor) else a.dtype
    check_choice("out_dtype", out_dtype, HALF_OR_SINGLE)
    return out_dtype


# ---- registration: flat arguments in, flat tensors out --------------------------------------------------------------


def _flat(x: Tensor | Fp8Tensor) -> tuple[Tensor, Tensor | None]:
    return (x.data, x.scale) if isinstance(x, Fp8Tensor) else (x, None)


def _operand(data: Tensor, scale: Tensor | None, block: tuple[int, int] = (1, 128)) -> Tensor | Fp8Tensor:
    return data if scale is None else Fp8Tensor(data, scale, block)


def _grouped_gemm_reference(a, a_scale, b, b_scale, offsets, out_dtype):
    b = _operand(b, b_scale, (128, 128))
    return reference_gemm(_operand(a, a_scale), b, offsets, out_dtype=out_dtype)


def _grouped_gemm_out_reference(a, a_scale, b, b_scale, offsets, out):
    reference_gemm(_operand(a, a_scale), _operand(b, b_scale, (128, 128)), offsets, out=out)


def _grouped_gemm_masked_reference(a, a_scale, b, b_scale, counts, out):
    reference_masked(_operand(a, a_scale), _operand(b, b_scale, (128, 128)), counts, out=out)


def _grouped_wgrad_reference(dy, dy_scale, x, x_scale, offsets, out, accumulate):
    dy, x = _operand(dy, dy_scale), _operand(x, x_scale)
    reference_wgrad(dy, x, offsets, out=out, accumulate=accumulate)


def _quantize_grouped_reference(x: Tensor, offsets: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    result = reference_quantize(x, offsets, scale_format="ue8m0" if ue8m0 else "fp32")
    return result.data, result.scale


def _empty_grouped(x: Tensor, offsets: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    width = padded_width(x.shape[0], offsets.shape[0] - 1)
    data = x.new_empty((x.shape[1], width), dtype=torch.float8_e4m3fn)
    return data, empty_scale(x, (x.shape[1], width // 128), (1, 128))


OPERANDS = "Tensor a, Tensor? a_scale, Tensor b, Tensor? b_scale"

_grouped_gemm = Operation(
    f"grouped_gemm({OPERANDS}, Tensor offsets, ScalarType out_dtype) -> Tensor",
    reference=_grouped_gemm_reference,
    triton="dskernels.grouped_gemm.triton:grouped_gemm",
    hopper="dskernels.grouped_gemm.hopper:grouped_gemm",
    fake=lambda a, a_scale, b, b_scale, offsets, out_dtype: a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype),
)
_grouped_gemm_out = Operation(
    f"grouped_gemm_out({OPERANDS}, Tensor offsets, Tensor(a!) out) -> ()",
    reference=_grouped_gemm_out_reference,
    triton="dskernels.grouped_gemm.triton:grouped_gemm_out",
    hopper="dskernels.grouped_gemm.hopper:grouped_gemm_out",
)
_grouped_gemm_masked = Operation(
    f"grouped_gemm_masked({OPERANDS}, Tensor counts, Tensor(a!) out) -> ()",
    reference=_grouped_gemm_masked_reference,
    triton="dskernels.grouped_gemm.triton:grouped_gemm_masked",
    hopper="dskernels.grouped_gemm.hopper:grouped_gemm_masked",
)
_grouped_wgrad = Operation(
    "grouped_wgrad(Tensor dy, Tensor? dy_scale, Tensor x, Tensor? x_scale, Tensor offsets, Tensor(a!) out, "
    "bool accumulate) -> ()",
    reference=_grouped_wgrad_reference,
    triton="dskernels.grouped_gemm.triton_wgrad:grouped_wgrad",
    hopper="dskernels.grouped_gemm.hopper:grouped_wgrad",
)
_quantize_grouped = Operation(
    "quantize_grouped(Tensor x, Tensor offsets, bool ue8m0) -> (Tensor, Tensor)",
    reference=_quantize_grouped_reference,
    triton="dskernels.grouped_gemm.triton_wgrad:quantize_grouped",
    hopper="dskernels.grouped_gemm.hopper_quantize:quantize_grouped",
    fake=_empty_grouped,
)


def _gradients(
    dy: Tensor, a: Tensor, b: Tensor, offsets: Tensor, needs_da: bool, needs_db: bool, impl: str | None
) -> tuple[Tensor, Tensor]:
    da, db = _empty_gradients(dy, a, b, offsets, needs_da, needs_db)
    dy = dy.to(a.dtype)
    if needs_da:
        da = _grouped_gemm(dy, None, b.mT, None, offsets, a.dtype, impl=impl)
    if needs_db:
        _grouped_wgrad(dy, None, a, None, offsets, db, False, impl=impl)  # rounded once, in the kernel
    return da, db


def _empty_gradients(dy, a, b, offsets, needs_da, needs_db):
    """Empty gradients of the right shape; one that is not needed has no rows."""
    da = a.new_empty((a.shape[0] if needs_da else 0, a.shape[1]))
    return da, b.new_empty((b.shape[0] if needs_db else 0, *b.shape[1:]))


_grouped_gemm_backward = Operation(
    "grouped_gemm_backward(Tensor dy, Tensor a, Tensor b, Tensor offsets, bool needs_da, bool needs_db)"
    " -> (Tensor, Tensor)",
    composite=_gradients,
    fake=_empty_gradients,
)


def _save(ctx: Any, args: tuple, output: Tensor) -> None:
    a, a_scale, b, _, offsets, _ = args
    ctx.save_for_backward(a, b, offsets)
    ctx.plain = a_scale is None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    a, b, offsets = ctx.saved_tensors
    needs_da, needs_db = (ctx.plain and ctx.needs_input_grad[i] for i in (0, 2))
    da = db = None
    if needs_da or needs_db:
        da, db = _grouped_gemm_backward(dy.contiguous(), a, b, offsets, needs_da, needs_db, impl=ctx.impl)
    return da if needs_da else None, None, db if needs_db else None, None, None, None


_grouped_gemm.register_autograd(_backward, _save)
