"""Public loss operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dskernels.dispatch import Operation, differentiating
from dskernels.reference import loss as reference
from dskernels.repeated import repeated
from dskernels.validate import HALF_OR_SINGLE, check_tensor

FLOATS = (*HALF_OR_SINGLE, torch.float64)


@repeated
def cross_entropy(logits: Tensor, targets: Tensor, *, impl: str | None = None) -> Tensor:
    """Cross entropy of each token, in nats: ``log(sum over v of exp(logits[t, v])) - logits[t, targets[t]]``.

    Args:
        logits: bf16, fp16, fp32 or fp64 ``[T, V]``, last dimension contiguous, V at least 1.
        targets: int32 or int64 ``[T]``, the column of each row. Rows with -100, or any other number that is not a
            column, are left out.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        fp32 ``[T]`` (fp64 for fp64 logits), 0 for a row that is left out. Computed in fp32, without an fp32 copy of the
        logits. Repeated calls return the same bits.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, strides or devices do not fit.

    Differentiable in `logits`: the gradient, ``(softmax - onehot)`` times that of the row, has their dtype and is 0 in
    rows that are left out. The logits and one number per row are saved for it. A NaN stays in its row. (fp64 runs on
    the reference.)
    Source: `torch.nn.functional.cross_entropy`, of each row alone; DeepSeek-V3 report (arXiv 2412.19437), eq. 24.
    """
    check_tensor("logits", logits, dtype=FLOATS, shape=("T", "V"))
    if logits.shape[1] == 0:
        raise ValueError(f"logits: expected at least one column, got {list(logits.shape)}")
    check_tensor("targets", targets, dtype=(torch.int32, torch.int64), shape=(logits.shape[0],), like=logits)
    return _cross_entropy(logits, targets, impl=impl)[0]


# ---- registration: flat arguments in, flat tensors out --------------------------------------------------------------


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _forward_reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return reference.cross_entropy(logits, targets), logits.to(_wide(logits)).logsumexp(1)


def _backward_reference(dnats: Tensor, logits: Tensor, targets: Tensor, lse: Tensor) -> Tensor:
    with differentiating():
        logits = logits.detach().requires_grad_()
        nats = reference.cross_entropy(logits, targets)
    return torch.autograd.grad(nats, logits, dnats)[0]


def _per_token(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    nats, lse = (logits.new_empty(logits.shape[0], dtype=_wide(logits)) for _ in range(2))
    return nats, lse


_cross_entropy = Operation(
    "cross_entropy(Tensor logits, Tensor targets) -> (Tensor, Tensor)",
    reference=_forward_reference,
    triton="dskernels.loss.triton:cross_entropy",
    fake=_per_token,
)
_cross_entropy_backward = Operation(
    "cross_entropy_backward(Tensor dnats, Tensor logits, Tensor targets, Tensor lse) -> Tensor",
    reference=_backward_reference,
    triton="dskernels.loss.triton:cross_entropy_backward",
    fake=lambda dnats, logits, targets, lse: logits.new_empty(logits.shape),
)


def _save(ctx: Any, args: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, targets = args
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, output[1])


def _backward(ctx: Any, dnats: Tensor | None, _: None) -> tuple[Tensor | None, None]:
    if dnats is None:
        return None, None
    return _cross_entropy_backward(dnats.contiguous(), *ctx.saved_tensors, impl=ctx.impl), None


_cross_entropy.register_autograd(_backward, _save)
