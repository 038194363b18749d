"""The public operation that merges attention over disjoint sets of keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dskernels.dispatch import Operation, differentiating
from dskernels.reference import mla as reference
from dskernels.repeated import repeated
from dskernels.validate import HALF_OR_SINGLE, check_tensor


@repeated
def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys into attention over their union.

    lse = log(e^lse_a + e^lse_b), out = e^(lse_a - lse) * out_a + e^(lse_b - lse) * out_b.

    Args:
        out_a: bf16, fp16 or fp32 ``[..., Q, H, V]``: ``[T, H, V]`` of a prefill, ``[B, Q, H, V]`` of a decode. (fp64
            runs on the reference.)
        lse_a: natural-log log-sum-exp, fp32 (fp64 with out_a) ``[..., H, Q]``: the dimensions of `out_a` without the
            last, the head before the query, as prefill (``[H, T]``) and decode (``[B, H, Q]``) return it.
        out_b: like `out_a`.
        lse_b: like `lse_a`.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        out and lse, like `out_a` and `lse_a`.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, strides or devices do not fit.

    An lse of -inf (or of +inf, as some kernels write it) marks a state that saw nothing: its out is ignored, even NaN.
    Two such states give out 0 and lse -inf. A NaN in an lse, or in the out of a state that saw something, is passed on.
    No rows give an empty result. Differentiable in all four arguments; a state that saw nothing gets gradient 0.
    Source: FlashInfer (arXiv 2501.01005), section 2.2.
    """
    check_tensor("out_a", out_a, dtype=(*HALF_OR_SINGLE, torch.float64))
    if out_a.dim() < 3 or out_a.shape[-1] == 0:
        raise ValueError(f"out_a: expected shape [..., Q, H, V], V > 0, got {list(out_a.shape)}")
    check_tensor("out_b", out_b, dtype=out_a.dtype, shape=tuple(out_a.shape), like=out_a)
    *batch, queries, heads, _ = out_a.shape
    lse_dtype = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_tensor(name, lse, dtype=lse_dtype, shape=(*batch, heads, queries), like=out_a)
    return _merge_states(out_a, lse_a, out_b, lse_b, impl=impl)


# ---- registration ---------------------------------------------------------------------------------------------------


def _reference(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = reference.merge_states(out_a, lse_a, out_b, lse_b)
    return out.contiguous(), lse.contiguous()


def _backward_reference(
    dout: Tensor, dlse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, ...]:
    with differentiating():
        inputs = [x.detach().requires_grad_() for x in (out_a, lse_a, out_b, lse_b)]
        gradients = torch.autograd.grad(reference.merge_states(*inputs), inputs, (dout, dlse))
    return tuple(gradient.contiguous() for gradient in gradients)


_merge_states = Operation(
    "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    reference=_reference,
    triton="dskernels.mla.merge.triton:merge_states",
    fake=lambda out_a, lse_a, out_b, lse_b: (_contiguous(out_a), _contiguous(lse_a)),
)
_merge_states_backward = Operation(
    "merge_states_backward(Tensor dout, Tensor dlse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    triton="dskernels.mla.merge.triton:merge_states_backward",
    fake=lambda dout, dlse, *inputs: tuple(_contiguous(x) for x in inputs),
)


def _contiguous(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, args: tuple, output: tuple) -> None:
    ctx.save_for_backward(*args)


def _backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
    return _merge_states_backward(dout, dlse, *ctx.saved_tensors, impl=ctx.impl)


_merge_states.register_autograd(_backward, _save)
