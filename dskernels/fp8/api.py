"""Public quantising operations: e4m3 values with one fp32 scale a tile."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from dskernels.dispatch import Operation
from dskernels.fp8.layout import empty_quantized
from dskernels.reference import fp8 as reference
from dskernels.repeated import repeated
from dskernels.types import Block, Fp8Tensor
from dskernels.validate import HALF_OR_SINGLE, check_bool, check_choice, check_float, check_tensor

BLOCKS: tuple[Block, ...] = ((1, 128), (128, 128), (128, 1))
SCALE_FORMATS = ("fp32", "ue8m0")


@repeated
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
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

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
    check_bool("transpose", transpose)
    stacked = isinstance(x, Tensor) and x.dim() == 3 and block == (128, 128)
    check_tensor("x", x, dtype=HALF_OR_SINGLE, shape=("E", "rows", "cols") if stacked else ("rows", "cols"))
    data, scale = _quantize(x, *block, scale_format == "ue8m0", transpose, impl=impl)
    return Fp8Tensor(data, scale, (block[1], block[0]) if transpose else block)


@repeated
def quantize_both(
    x: Tensor, *, block: Block = (1, 128), scale_format: str = "fp32", impl: str | None = None
) -> tuple[Fp8Tensor, Fp8Tensor]:
    """Quantise a gradient for Dgrad and for Wgrad, or a weight for Fprop and for Dgrad, in one pass over it.

    The same as ``quantize(x)`` and ``quantize(x, (128, 1), transpose=True)``, or with ``block=(128, 128)`` as
    ``quantize(x, block)`` and ``quantize(x, block, transpose=True)``, reading `x` once.

    Args:
        x: bf16, fp16 or fp32 ``[T, N]``, last dimension contiguous; a weight also ``[E, rows, cols]``.
        block: ``(1, 128)`` of a gradient, ``(128, 128)`` of a weight.
        scale_format: ``"fp32"`` or ``"ue8m0"``, see :func:`quantize`.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        Fp8Tensor of x ``[T, N]`` and Fp8Tensor of x.T ``[N, T]``, both in 1x128 tiles, or both in 128x128 blocks.

    Raises:
        TypeError, ValueError: as :func:`quantize`.

    Source: DeepSeek-V3 report, section 3.3.2 and figure 6.
    """
    check_choice("scale_format", scale_format, SCALE_FORMATS)
    check_choice("block", block, ((1, 128), (128, 128)))
    if block == (128, 128):
        stacked = isinstance(x, Tensor) and x.dim() == 3
        check_tensor("x", x, dtype=HALF_OR_SINGLE, shape=("E", "rows", "cols") if stacked else ("rows", "cols"))
        data, scale, data_t, scale_t = _quantize_weight(x, scale_format == "ue8m0", impl=impl)
        return Fp8Tensor(data, scale, block), Fp8Tensor(data_t, scale_t, block)
    check_tensor("x", x, dtype=HALF_OR_SINGLE, shape=("T", "N"))
    data, scale, data_t, scale_t = _quantize_both(x, scale_format == "ue8m0", impl=impl)
    return Fp8Tensor(data, scale), Fp8Tensor(data_t, scale_t)


@repeated
def swiglu_quantize(
    gate_up: Tensor, *, scale_format: str = "fp32", transpose: bool = False, impl: str | None = None
) -> Fp8Tensor:
    """Quantise silu(gate) * up in 1x128 tiles, without writing the product out.

    Args:
        gate_up: bf16, fp16 or fp32 ``[T, 2 * I]``, gate in the first I columns, up in the last I.
        scale_format: ``"fp32"`` or ``"ue8m0"``, see :func:`quantize`.
        transpose: quantise along tokens and return the transpose ``[I, T]``, as
            ``quantize(product, (128, 1), transpose=True)`` would: the operand of Wgrad, recomputed from what was kept.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        Fp8Tensor ``[T, I]``, or ``[I, T]`` if `transpose`. The product is formed in fp32 and not rounded before
        quantising. Compared with the reference, data agrees within one e4m3 step and scale within 2 ulp (to the bit
        if both run on the same GPU).

    Raises:
        TypeError, ValueError: as :func:`quantize`, and ValueError for an odd number of columns.

    A NaN in a tile makes all of it NaN on dequantising. No tokens give an empty result.
    Source: Shazeer, arXiv 2002.05202; DeepSeek-V3 report, section 3.3.3.
    """
    check_choice("scale_format", scale_format, SCALE_FORMATS)
    check_bool("transpose", transpose)
    _check_gate_up(gate_up)
    return Fp8Tensor(*_swiglu_quantize(gate_up, scale_format == "ue8m0", transpose, impl=impl))


@repeated
def swiglu_quantize_backward(
    dy: Tensor, gate_up: Tensor, *, scale_format: str = "fp32", impl: str | None = None
) -> tuple[Fp8Tensor, Fp8Tensor]:
    """Gradient of silu(gate) * up with respect to gate_up, quantised for Dgrad and for Wgrad, without writing it out.

    dgate = dy * up * (s + gate * s * (1 - s)), dup = dy * gate * s, with s = sigmoid(gate).

    Args:
        dy: bf16, fp16 or fp32 ``[T, I]``, the gradient of the product.
        gate_up: bf16, fp16 or fp32 ``[T, 2 * I]``, the input of the product, as for :func:`swiglu_quantize`.
        scale_format: ``"fp32"`` or ``"ue8m0"``, see :func:`quantize`.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        Fp8Tensor of the gradient ``[T, 2 * I]`` and Fp8Tensor of its transpose ``[2 * I, T]``, both in 1x128 tiles, as
        :func:`quantize_both` makes them. The gradient is formed in fp32 and not rounded before quantising. Compared
        with the reference, data agrees within one e4m3 step and scale within 2 ulp (to the bit if both run on the same
        GPU).

    Raises:
        TypeError, ValueError: as :func:`quantize`, and ValueError where `dy` does not fit `gate_up`.

    A NaN in a tile makes all of it NaN on dequantising. No tokens give empty results.
    Source: Shazeer, arXiv 2002.05202; DeepSeek-V3 report, section 3.3.2 and figure 6.
    """
    check_choice("scale_format", scale_format, SCALE_FORMATS)
    _check_gate_up(gate_up)
    check_tensor("dy", dy, dtype=HALF_OR_SINGLE, shape=(gate_up.shape[0], gate_up.shape[1] // 2), like=gate_up)
    data, scale, data_t, scale_t = _swiglu_quantize_backward(dy, gate_up, scale_format == "ue8m0", impl=impl)
    return Fp8Tensor(data, scale), Fp8Tensor(data_t, scale_t)


def _check_gate_up(gate_up: Tensor) -> None:
    check_tensor("gate_up", gate_up, dtype=HALF_OR_SINGLE, shape=("T", "2 * I"))
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected an even number of columns, got {list(gate_up.shape)}")


@overload
def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: None = None,
    *,
    with_normed: Literal[False] = False,
    scale_format: str = ...,
    impl: str | None = ...,
) -> Fp8Tensor: ...
@overload
def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor,
    *,
    with_normed: Literal[False] = False,
    scale_format: str = ...,
    impl: str | None = ...,
) -> tuple[Fp8Tensor, Tensor]: ...
@overload
def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    *,
    with_normed: Literal[True],
    scale_format: str = ...,
    impl: str | None = ...,
) -> tuple[Fp8Tensor, Tensor, Tensor]: ...
@repeated
def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    *,
    with_normed: bool = False,
    scale_format: str = "fp32",
    impl: str | None = None,
) -> Fp8Tensor | tuple[Fp8Tensor, Tensor] | tuple[Fp8Tensor, Tensor, Tensor]:
    """Normalise and quantise in 1x128 tiles: x / sqrt(mean(x^2) + eps) * weight, of x + residual if that is given.

    Args:
        x: bf16, fp16 or fp32 ``[T, H]``.
        weight: bf16, fp16 or fp32 ``[H]``.
        eps: added to the mean square.
        residual: the residual stream, like `x`; the sum is rounded to x's dtype before it is normalised.
        with_normed: return the norm in x's dtype as well, for consumers that do not multiply in e4m3 (a router).
        scale_format: ``"fp32"`` or ``"ue8m0"``, see :func:`quantize`.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        Fp8Tensor ``[T, H]``; with `residual`, that and the new residual stream ``x + residual``; with `with_normed`,
        these two (the stream is `x` itself if there is no `residual`) and the norm. The norm is not rounded to x's
        dtype before it is quantised. Compared with the reference, data agrees within one e4m3 step and scale within
        2 ulp: squares are summed in higher precision than fp32, so that their order does not matter.

    Raises:
        TypeError, ValueError: as :func:`quantize`, and ValueError where `weight` or `residual` does not fit `x`, or
            `eps` is not finite.

    Differentiable in `x`, `weight` and `residual`, through the norm and through the stream, by
    :func:`rmsnorm_backward`; the stream is saved for it, not the norm. The quantised result carries no gradient: pass
    it to :func:`dskernels.fp8_linear` as `quantized`, next to the norm.
    Source: Zhang and Sennrich, arXiv 1910.07467, eq. 4; DeepSeek-V3 report, section 3.3.
    """
    check_choice("scale_format", scale_format, SCALE_FORMATS)
    check_tensor("x", x, dtype=HALF_OR_SINGLE, shape=("T", "H"))
    check_tensor("weight", weight, dtype=HALF_OR_SINGLE, shape=(x.shape[1],), like=x)
    check_float("eps", eps)
    if residual is not None:
        check_tensor("residual", residual, dtype=x.dtype, shape=tuple(x.shape), like=x)
    check_choice("with_normed", with_normed, (True, False))
    ue8m0 = scale_format == "ue8m0"
    results = _rmsnorm_quantize(x, weight, eps, residual, ue8m0, bool(with_normed), impl=impl)
    return _normed(x, results, residual is None, bool(with_normed))


def _normed(
    x: Tensor, results: tuple[Tensor, ...], alone: bool, with_normed: bool
) -> Fp8Tensor | tuple[Fp8Tensor, Tensor] | tuple[Fp8Tensor, Tensor, Tensor]:
    """What `rmsnorm_quantize` returns of the operation's results."""
    data, scale, total, normed = results
    quantized = Fp8Tensor(data, scale)
    if with_normed:
        return quantized, x if alone else total, normed
    return quantized if alone else (quantized, total)


@repeated
def rmsnorm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    dresidual: Tensor | None = None,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of RMSNorm, in one pass over `dy` and `x`.

    r = 1 / sqrt(mean(x^2) + eps), n = x * r, g = dy * weight:
    dx = r * (g - n * mean(g * n)) + dresidual, dweight = sum over tokens of dy * n.

    Args:
        dy: bf16, fp16 or fp32 ``[T, H]``, the gradient of the normalised rows.
        x: bf16, fp16 or fp32 ``[T, H]``, the input of the norm: with a residual, the sum that
            :func:`rmsnorm_quantize` returned.
        weight: bf16, fp16 or fp32 ``[H]``.
        eps: added to the mean square.
        dresidual: bf16, fp16 or fp32 ``[T, H]``, the gradient that arrives on the residual stream past the norm.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        (dx ``[T, H]`` in x's dtype, dweight ``[H]`` in weight's dtype). All arithmetic is in fp32, rounded once.
        Repeated calls on one GPU return the same bits: dweight is summed without atomics.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, strides or devices do not fit `x`, or `eps` is not finite.

    A NaN in a row makes that row of dx NaN, and dweight where dy * n is. No tokens give an empty dx and zeros.
    Source: Zhang and Sennrich, arXiv 1910.07467, section 4.
    """
    check_tensor("x", x, dtype=HALF_OR_SINGLE, shape=("T", "H"))
    check_tensor("dy", dy, dtype=HALF_OR_SINGLE, shape=tuple(x.shape), like=x)
    check_tensor("weight", weight, dtype=HALF_OR_SINGLE, shape=(x.shape[1],), like=x)
    check_float("eps", eps)
    if dresidual is not None:
        check_tensor("dresidual", dresidual, dtype=HALF_OR_SINGLE, shape=tuple(x.shape), like=x)
    return _rmsnorm_backward(dy, x, weight, eps, dresidual, impl=impl)


# ---- registration: flat arguments in, flat tensors out --------------------------------------------------------------


def _format(ue8m0: bool) -> str:
    return "ue8m0" if ue8m0 else "fp32"


def _quantize_reference(x: Tensor, rows: int, cols: int, ue8m0: bool, transpose: bool) -> tuple[Tensor, Tensor]:
    return reference.quantize(x, (rows, cols), scale_format=_format(ue8m0), transpose=transpose)[:2]


def _quantize_both_reference(x: Tensor, ue8m0: bool) -> tuple[Tensor, ...]:
    by_row, by_column = reference.quantize_both(x, scale_format=_format(ue8m0))
    return *by_row[:2], *by_column[:2]


def _quantize_weight_reference(x: Tensor, ue8m0: bool) -> tuple[Tensor, ...]:
    blocks, turned = reference.quantize_both(x, block=(128, 128), scale_format=_format(ue8m0))
    return *blocks[:2], *turned[:2]


def _swiglu_quantize_reference(gate_up: Tensor, ue8m0: bool, transpose: bool) -> tuple[Tensor, Tensor]:
    return reference.swiglu_quantize(gate_up, scale_format=_format(ue8m0), transpose=transpose)[:2]


def _swiglu_quantize_backward_reference(dy: Tensor, gate_up: Tensor, ue8m0: bool) -> tuple[Tensor, ...]:
    by_row, by_column = reference.swiglu_quantize_backward(dy, gate_up, scale_format=_format(ue8m0))
    return *by_row[:2], *by_column[:2]


def _rmsnorm_quantize_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, ue8m0: bool, with_normed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, normed = (x.new_empty(0, x.shape[1]) for _ in range(2))
    result = reference.rmsnorm_quantize(x, weight, eps, residual, with_normed=with_normed, scale_format=_format(ue8m0))
    quantized, *rest = (result,) if isinstance(result, Fp8Tensor) else result
    return (
        quantized.data,
        quantized.scale,
        total if residual is None else rest[0],
        rest[-1] if with_normed else normed,
    )


_quantize = Operation(
    "quantize(Tensor x, int block_rows, int block_cols, bool ue8m0, bool transpose) -> (Tensor, Tensor)",
    reference=_quantize_reference,
    triton="dskernels.fp8.triton:quantize",
    hopper="dskernels.fp8.hopper:quantize",
    fake=lambda x, rows, cols, ue8m0, transpose: empty_quantized(x, (rows, cols), transpose),
)
_quantize_both = Operation(
    "quantize_both(Tensor x, bool ue8m0) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_quantize_both_reference,
    triton="dskernels.fp8.triton:quantize_both",
    hopper="dskernels.fp8.hopper:quantize_both",
    fake=lambda x, ue8m0: (*empty_quantized(x, (1, 128)), *empty_quantized(x, (128, 1), transpose=True)),
)
_quantize_weight = Operation(
    "quantize_weight(Tensor x, bool ue8m0) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_quantize_weight_reference,
    triton="dskernels.fp8.triton:quantize_weight",
    hopper="dskernels.fp8.hopper:quantize_weight",
    fake=lambda x, ue8m0: (*empty_quantized(x, (128, 128)), *empty_quantized(x, (128, 128), transpose=True)),
)
_swiglu_quantize = Operation(
    "swiglu_quantize(Tensor gate_up, bool ue8m0, bool transpose) -> (Tensor, Tensor)",
    reference=_swiglu_quantize_reference,
    triton="dskernels.fp8.triton_swiglu:swiglu_quantize",
    hopper="dskernels.fp8.hopper:swiglu_quantize",
    fake=lambda gate_up, ue8m0, transpose: empty_quantized(
        gate_up[:, : gate_up.shape[1] // 2], (128, 1) if transpose else (1, 128), transpose
    ),
)
_swiglu_quantize_backward = Operation(
    "swiglu_quantize_backward(Tensor dy, Tensor gate_up, bool ue8m0) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_swiglu_quantize_backward_reference,
    triton="dskernels.fp8.triton_swiglu:swiglu_quantize_backward",
    hopper="dskernels.fp8.hopper:swiglu_quantize_backward",
    fake=lambda dy, gate_up, ue8m0: (
        *empty_quantized(gate_up, (1, 128)),
        *empty_quantized(gate_up, (128, 1), transpose=True),
    ),
)
_rmsnorm_quantize = Operation(
    "rmsnorm_quantize(Tensor x, Tensor weight, float eps, Tensor? residual, bool ue8m0, bool with_normed)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_rmsnorm_quantize_reference,
    triton="dskernels.fp8.triton_norm:rmsnorm_quantize",
    hopper="dskernels.fp8.hopper_norm:rmsnorm_quantize",
    fake=lambda x, weight, eps, residual, ue8m0, with_normed: (
        *empty_quantized(x, (1, 128)),
        x.new_empty(0, x.shape[1]) if residual is None else torch.empty_like(x),
        x.new_empty(x.shape[0] if with_normed else 0, x.shape[1]),
    ),
)
_rmsnorm_backward = Operation(
    "rmsnorm_backward(Tensor dy, Tensor x, Tensor weight, float eps, Tensor? dresidual) -> (Tensor, Tensor)",
    reference=reference.rmsnorm_backward,
    triton="dskernels.fp8.triton_norm:rmsnorm_backward",
    fake=lambda dy, x, weight, eps, dresidual: (x.new_empty(x.shape), torch.empty_like(weight)),
)


def _save_rmsnorm(ctx: Any, args: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, ctx.eps, residual, *_ = args
    data, scale, total, _ = output
    ctx.mark_non_differentiable(data, scale)
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(total if ctx.has_residual else x, weight)


def _differentiate_rmsnorm(
    ctx: Any, _data: None, _scale: None, dtotal: Tensor | None, dnormed: Tensor | None
) -> tuple[Tensor | None, ...]:
    stream, weight = ctx.saved_tensors
    dtotal = dtotal if ctx.has_residual else None
    if dnormed is None:
        dx, dweight = dtotal, None
    else:
        dtotal = None if dtotal is None else dtotal.contiguous()
        impl = "triton" if ctx.impl == "hopper" else ctx.impl  # there is no other
        dx, dweight = _rmsnorm_backward(dnormed.contiguous(), stream, weight, ctx.eps, dtotal, impl=impl)
    return dx, dweight, None, dx if ctx.has_residual else None, None, None


_rmsnorm_quantize.register_autograd(_differentiate_rmsnorm, _save_rmsnorm)
