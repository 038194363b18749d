"""Public e4m3 matrix products: `fp8_gemm`, and `fp8_linear` with its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dskernels.device import empty
from dskernels.dispatch import Operation
from dskernels.fp8 import quantize, quantize_both
from dskernels.fp8.api import SCALE_FORMATS
from dskernels.fp8.layout import empty_quantized
from dskernels.gemm.weights import done_with, weight_operand
from dskernels.gradients import refusing
from dskernels.later import waiting_for
from dskernels.recording import Recorded
from dskernels.reference import gemm as reference
from dskernels.repeated import repeated
from dskernels.types import Block, Fp8Tensor
from dskernels.validate import HALF_OR_SINGLE, check_bool, check_choice, check_fp8, check_tensor, check_written

A_BLOCKS: tuple[Block, ...] = ((1, 128),)
B_BLOCKS: tuple[Block, ...] = ((128, 128), (1, 128))
KEPT = ("fp8", "input")


@repeated
def fp8_gemm(
    a: Fp8Tensor,
    b: Fp8Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Multiply two block-scaled e4m3 matrices: ``a @ b.T (+ bias)``.

    C[m, n] = sum over blocks k of 128: (sum over i in k of a.data[m, i] * b.data[n, i]) * a.scale[m, k] * b.scale[n,
    k]. Each inner sum has an accumulator of its own; the outer sum is in fp32.

    Args:
        a: ``[M, K]`` in 1x128 tiles, M and K any size.
        b: ``[N, K]`` in 128x128 blocks (a weight: Fprop, Dgrad) or in 1x128 tiles (Wgrad), N any size.
        out_dtype: bf16, fp16 or fp32; ignored if `out` is given.
        bias: bf16, fp16 or fp32 ``[N]``, added before rounding.
        out: ``[M, N]`` bf16, fp16 or fp32 to write to, last dimension contiguous.
        accumulate: add to `out` (in fp32, rounded once) instead of overwriting it.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        ``[M, N]``; `out` itself if it is given. Repeated calls return the same bits.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, tiles, strides or devices do not fit, or `accumulate` is given without `out`.

    M = 0 or N = 0 gives an empty result; K = 0 gives zeros (plus the bias). Not differentiable: see :func:`fp8_linear`.
    Source: DeepSeek-V3 report (arXiv 2412.19437), section 3.3.2.
    """
    check_fp8("a", a, blocks=A_BLOCKS)
    check_fp8("b", b, blocks=B_BLOCKS, like=a.data)
    if type(accumulate) is not bool:
        check_bool("accumulate", accumulate)
    (m, k), (n, k_b) = a.data.shape, b.data.shape
    if k != k_b:
        raise ValueError(f"b: expected K = {k} columns like a, got {k_b}")
    if bias is not None:
        check_tensor("bias", bias, dtype=HALF_OR_SINGLE, shape=(n,), like=a.data)
    made = out is None
    if out is None:
        if accumulate:
            raise ValueError("accumulate: expected `out` to add to, got out=None")
        check_choice("out_dtype", out_dtype, HALF_OR_SINGLE)
        out = empty(a.data, (m, n), out_dtype)
    else:
        check_tensor("out", out, dtype=HALF_OR_SINGLE, shape=(m, n), like=a.data)
        check_written("out", out)
    operands = a.data, a.scale, b.data, b.scale
    _fp8_gemm(*operands, b.block[0], bias, out, accumulate, impl=impl)
    return refusing("fp8_gemm", out, (*operands, bias)) if made else out


@repeated
def fp8_linear(
    x: Tensor,
    weight: Tensor | Fp8Tensor,
    bias: Tensor | None = None,
    *,
    quantized: Fp8Tensor | None = None,
    scale_format: str = "fp32",
    keep: str = "fp8",
    impl: str | None = None,
) -> Tensor:
    """A linear layer whose three products run in e4m3: ``x @ weight.T + bias``, and its gradients.

    Fprop multiplies x in 1x128 tiles by the weight in 128x128 blocks. Dgrad multiplies dy in 1x128 tiles by the same
    weight. Wgrad multiplies dy.T by x.T, both in tiles of 128 tokens, quantised from the original values rather than
    from their e4m3 copies, and accumulated in fp32.

    The quantised weight is kept until the weight changes, which is recognised by its data pointer and version counter,
    or until its gradient has been computed. In inference, code that changes a weight without raising its version
    (``weight.data.copy_(...)``, a collective) has to announce it:
    ``torch.autograd.graph.increment_version(weight)``.

    Args:
        x: bf16, fp16 or fp32 ``[..., K]``.
        weight: ``[N, K]``, a bf16, fp16 or fp32 master weight, or an `Fp8Tensor` in 128x128 blocks, which gets no
            gradient.
        bias: bf16, fp16 or fp32 ``[N]``.
        quantized: ``[rows of x, K]`` in 1x128 tiles: the quantised `x`, if :func:`dskernels.quantize` or
            :func:`dskernels.rmsnorm_quantize` has already computed it. Fprop uses it instead of quantising `x`.
        scale_format: format of the scales of `x`, ``"fp32"`` or ``"ue8m0"`` (powers of two), see
            :func:`dskernels.quantize`.
        keep: what is saved of `x` for Wgrad. ``"fp8"`` saves its quantised transpose, one byte per element;
            ``"input"`` saves `x` itself, which is quantised in the backward, and costs nothing if something else keeps
            `x` anyway. The gradients have the same bits.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        ``[..., N]`` in x's dtype. Each gradient has the dtype of its tensor.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, strides or devices do not fit, or `scale_format` or `keep` is not one of the above.

    Source: DeepSeek-V3 report, figure 6 and section 3.3.
    """
    check_tensor("x", x, dtype=HALF_OR_SINGLE)
    check_choice("scale_format", scale_format, SCALE_FORMATS)
    check_choice("keep", keep, KEPT)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a scalar")
    if isinstance(weight, Fp8Tensor):
        check_fp8("weight", weight, blocks=((128, 128),), like=x)
    else:
        check_tensor("weight", weight, dtype=HALF_OR_SINGLE, shape=("N", "K"), like=x)
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: expected {x.shape[-1]} columns like x, got {weight.shape[1]}")
    if bias is not None:
        check_tensor("bias", bias, dtype=HALF_OR_SINGLE, shape=(weight.shape[0],), like=x)
    data, scale = (weight.data, weight.scale) if isinstance(weight, Fp8Tensor) else (weight, None)
    rows = x if x.dim() == 2 else x[None] if x.dim() == 1 else x.flatten(0, -2)
    if quantized is not None:
        check_fp8("quantized", quantized, blocks=A_BLOCKS, like=x)
        if quantized.shape != rows.shape:
            raise ValueError(f"quantized: expected the shape {list(rows.shape)} of x, got {list(quantized.shape)}")
    given = (None, None) if quantized is None else (quantized.data, quantized.scale)
    keeps = keep == "fp8" and scale is None and data.requires_grad and torch.is_grad_enabled()
    y = _fp8_linear(rows, data, scale, bias, *given, scale_format == "ue8m0", keeps, impl=impl)[0]
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


# ---- registration: flat arguments in, flat tensors out --------------------------------------------------------------


def _fp8_gemm_reference(a, a_scale, b, b_scale, b_rows, bias, out, accumulate):
    b = Fp8Tensor(b, b_scale, (b_rows, 128))
    reference.fp8_gemm(Fp8Tensor(a, a_scale), b, bias=bias, out=out, accumulate=accumulate)


_fp8_gemm = Operation(
    "fp8_gemm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, int b_rows, Tensor? bias, Tensor(a!) out, "
    "bool accumulate) -> ()",
    reference=_fp8_gemm_reference,
    triton="dskernels.gemm.triton:fp8_gemm",
    hopper="dskernels.gemm.hopper:fp8_gemm",
)


@Recorded
def _linear_forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    a: Tensor | None,
    a_scale: Tensor | None,
    ue8m0: bool,
    keep: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    form = "ue8m0" if ue8m0 else "fp32"
    rows = None if a is None or a_scale is None else Fp8Tensor(a, a_scale)
    columns = None
    if keep and rows is None:
        rows, columns = quantize_both(x, scale_format=form, impl=impl)
    elif keep:
        columns = quantize(x, (128, 1), scale_format=form, transpose=True, impl=impl)
    if rows is None:
        rows = quantize(x, scale_format=form, impl=impl)
    # Returned as bytes: torch lacks what autograd might do with e4m3 results, such as adding up their gradients.
    kept = _nothing_kept(x) if columns is None else (columns.data.view(torch.uint8), columns.scale)
    return fp8_gemm(rows, weight_operand(weight, scale, False, impl), out_dtype=x.dtype, bias=bias, impl=impl), *kept


def _fp8_linear_forward(*args: Any, impl: str | None) -> tuple[Tensor, Tensor, Tensor]:
    return _linear_forward(*args, impl)


def _nothing_kept(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty((0, 0), dtype=torch.uint8), x.new_empty((0, 0), dtype=torch.float32)


def _fp8_linear_fake(x, weight, scale, bias, a, a_scale, ue8m0, keep):
    y = x.new_empty(x.shape[0], weight.shape[0])
    if not keep:
        return y, *_nothing_kept(x)
    data, scale = empty_quantized(x, (128, 1), transpose=True)
    return y, data.view(torch.uint8), scale


@Recorded
def _linear_gradients(
    dy: Tensor,
    x: Tensor | None,
    x_t: Tensor | None,
    x_t_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    ue8m0: bool,
    needs_dx: bool,
    needs_dw: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    dx, dw = _empty_gradients(dy, x, x_t, x_t_scale, weight, scale, ue8m0, needs_dx, needs_dw)
    rows = columns = None
    if needs_dx and needs_dw:
        rows, columns = quantize_both(dy, impl=impl)
    elif needs_dx:
        rows = quantize(dy, impl=impl)
    elif needs_dw:
        columns = quantize(dy, (128, 1), transpose=True, impl=impl)
    if rows is not None:
        dx = fp8_gemm(rows, weight_operand(weight, scale, True, impl), out_dtype=dy.dtype, impl=impl)
    if columns is not None:
        if x is not None:
            kept = quantize(x, (128, 1), scale_format="ue8m0" if ue8m0 else "fp32", transpose=True, impl=impl)
        elif x_t is not None and x_t_scale is not None:
            kept = Fp8Tensor(x_t.view(torch.float8_e4m3fn), x_t_scale)
        else:
            raise ValueError("x, x_t: expected one of them, as the gradient of the weight is wanted")
        dw = fp8_gemm(columns, kept, out_dtype=weight.dtype, impl=impl)
    return dx, dw


def _fp8_linear_gradients(
    dy: Tensor,
    x: Tensor | None,
    x_t: Tensor | None,
    x_t_scale: Tensor | None,
    weight: Tensor,
    *options: Any,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    gradients = _linear_gradients(dy, x, x_t, x_t_scale, weight, *options, impl)
    *_, needs_dw = options
    if needs_dw:
        done_with(weight)
    return gradients


def _empty_gradients(dy, x, x_t, x_t_scale, weight, scale, ue8m0, needs_dx, needs_dw):
    """Empty gradients of the right shape; one that is not needed has no rows."""
    dx = dy.new_empty(dy.shape[0] if needs_dx else 0, weight.shape[1])
    return dx, weight.new_empty(weight.shape if needs_dw else (0, weight.shape[1]))


_fp8_linear = Operation(
    "fp8_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? quantized, Tensor? quantized_scale, "
    "bool ue8m0, bool keep) -> (Tensor, Tensor, Tensor)",
    composite=_fp8_linear_forward,
    fake=_fp8_linear_fake,
)
_fp8_linear_backward = Operation(
    "fp8_linear_backward(Tensor dy, Tensor? x, Tensor? x_t, Tensor? x_t_scale, Tensor weight, Tensor? scale, "
    "bool ue8m0, bool needs_dx, bool needs_dw) -> (Tensor, Tensor)",
    composite=_fp8_linear_gradients,
    fake=_empty_gradients,
)


def _save(ctx: Any, args: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, scale, bias, _, _, ctx.ue8m0, keep = args
    _, x_t, x_t_scale = output
    ctx.mark_non_differentiable(x_t, x_t_scale)
    ctx.set_materialize_grads(False)
    # The input is saved only if the gradient of the weight needs it.
    wants = scale is None and ctx.needs_input_grad[1]
    kept = (None, x_t, x_t_scale) if keep else (x if wants else None, None, None)
    ctx.save_for_backward(*kept, weight, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.waiting = waiting_for(weight)


def _backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, x_t, x_t_scale, weight, scale = ctx.saved_tensors
    needs_dx, needs_dw = ctx.needs_input_grad[0], ctx.needs_input_grad[1] and scale is None
    dx = dw = db = None
    operands = x, x_t, x_t_scale, weight, scale
    if dy is not None and needs_dw and ctx.waiting is not None:
        of = (dy.contiguous(), *operands, ctx.ue8m0)
        ctx.waiting.compute(lambda: _fp8_linear_backward(*of, False, True, impl=ctx.impl)[1:])
        needs_dw = False
    if dy is not None and (needs_dx or needs_dw):
        dx, dw = _fp8_linear_backward(dy.contiguous(), *operands, ctx.ue8m0, needs_dx, needs_dw, impl=ctx.impl)
    if dy is not None and ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        db = dy.float().sum(0).to(ctx.bias_dtype)
    return dx if needs_dx else None, dw if needs_dw else None, None, db, *[None] * 4


_fp8_linear.register_autograd(_backward, _save)
