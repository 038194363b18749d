"""Public operations that measure the load of experts and keep it even."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dskernels.dispatch import Operation, differentiating
from dskernels.reference import routing as reference
from dskernels.repeated import repeated
from dskernels.routing.api import SCORES, check_logits, check_top_k, like_logits, score_name
from dskernels.types import LoadStatistics
from dskernels.validate import check_choice, check_float, check_tensor, check_written


@repeated
def update_bias(
    bias: Tensor, load: Tensor, rate: float, group: dist.ProcessGroup | None = None, *, impl: str | None = None
) -> Tensor:
    """Move the bias of each expert by one step towards an even load, in place: b += rate * sign(mean load - load).

    Call it once after each training step, with the load of the whole batch: the sum of `Routing.load` over its
    microbatches, each token counted once (not again where activations are recomputed). It does not wait for the
    device.

    Args:
        bias: fp32 ``[E]``, a buffer (not a parameter that requires a gradient); written to.
        load: int32 or int64 ``[E]``, see :func:`route`; left as it is.
        rate: size of the step, 0.001 in DeepSeek-V3, 0 at the end of training.
        group: ranks over whose batches the load is summed first, in int64; None for this rank alone.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        `bias`. An expert of exactly the mean load, compared in whole numbers, keeps its bias.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices do not fit, `bias` requires a gradient, or `rate` is not finite.

    Source: DeepSeek-V3 report, section 2.1.2, "auxiliary-loss-free load balancing"; arXiv 2408.15664.
    """
    check_tensor("bias", bias, dtype=torch.float32, shape=("E",))
    if bias.requires_grad:  # whether it is recorded or not: a bias is no parameter
        raise ValueError("bias: expected a tensor that requires no gradient, as it is written to in place")
    check_written("bias", bias)
    check_tensor("load", load, dtype=(torch.int32, torch.int64), shape=tuple(bias.shape), like=bias)
    check_float("rate", rate)
    if group is not None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
        load = load.to(torch.int64, copy=True)
        dist.all_reduce(load, group=group)
    _update_bias(bias, load, rate, impl=impl)
    return bias


@repeated
def balance_loss(
    logits: Tensor,
    *,
    top_k: int,
    alpha: float,
    sequence_lengths: Tensor,
    score: str = "sigmoid",
    impl: str | None = None,
) -> Tensor:
    """Loss for an uneven load inside single sequences: alpha * sum over experts of f_i * P_i, averaged over sequences.

    f_i = E / (top_k * T) * (number of tokens whose `top_k` largest s contain i), of a sequence of T tokens: 1 for an
    even load. P_i = mean over its tokens of s_i / (sum of s over all experts). f uses s without bias and without
    groups, and carries no gradient.

    Args:
        logits: bf16, fp16 or fp32 ``[T, E]``, sequence after sequence, last dimension contiguous.
        top_k: experts a token, as in :func:`route`.
        alpha: factor of the loss, 1e-4 in DeepSeek-V3.
        sequence_lengths: int32 ``[S]``, on the device of `logits` and never read by the host. Tokens after the last
            sequence belong to none. A sequence ends where the tokens do, and a negative length is 0, so that lengths
            may be padded with zeros to a fixed S.
        score: ``"sigmoid"`` or ``"softmax"``, as in :func:`route`.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        fp32 ``[]``, differentiable in the logits. The average is over the sequences with at least one token that
        counts; 0 where there is none. Repeated calls return the same bits, and so do their gradients.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, strides or devices do not fit, or a number is out of its range.

    A token with a NaN among its logits, or with no finite logit, is left out as if it were not there. Infinite logits
    count as +-2^126 and get no gradient. Ties go to the smaller id.
    Source: DeepSeek-V3 report, eqs. 17-20.
    """
    check_logits(logits)
    check_top_k(top_k, logits.shape[1])
    check_float("alpha", alpha)
    check_tensor("sequence_lengths", sequence_lengths, dtype=torch.int32, shape=("S",), like=logits)
    check_choice("score", score, SCORES)
    return _balance_loss(logits, sequence_lengths, top_k, float(alpha), score == "softmax", impl=impl)


def load_statistics(load: Tensor) -> LoadStatistics:
    """Measure how even the load of experts is, for one layer or many at once.

    Args:
        load: int32 or int64 ``[..., E]``, see :func:`route`; it may be summed over steps and ranks.

    Returns:
        LoadStatistics: fp32 tensors on the device of `load`; the host does not wait for them. A load of zeros counts as
            even.

    Raises:
        TypeError: `load` is not a tensor of whole numbers.
        ValueError: `load` has no experts, or strides that do not fit.

    Source: `violation` is MaxVio of arXiv 2408.15664, section 4.1.
    """
    check_tensor("load", load, dtype=(torch.int32, torch.int64))
    if load.dim() == 0 or load.shape[-1] == 0:
        raise ValueError(f"load: expected at least one expert, got {list(load.shape)}")
    return reference.load_statistics(load)


# ---- registration: flat arguments in, flat tensors out --------------------------------------------------------------


def _update_bias_reference(bias, load, rate):
    reference.update_bias(bias, load, rate)


def _balance_loss_reference(logits, sequence_lengths, top_k, alpha, softmax):
    options = {"top_k": top_k, "alpha": alpha, "sequence_lengths": sequence_lengths, "score": score_name(softmax)}
    return reference.balance_loss(logits, **options)


def _balance_loss_backward_reference(grad, logits, *options):
    with differentiating():
        logits = logits.detach().requires_grad_()
        loss = _balance_loss_reference(logits, *options)
    return torch.autograd.grad(loss, logits, grad)[0]


_update_bias = Operation(
    "update_bias(Tensor(a!) bias, Tensor load, float rate) -> ()",
    reference=_update_bias_reference,
    triton="dskernels.routing.triton_balance:update_bias",
)
_balance_loss = Operation(
    "balance_loss(Tensor logits, Tensor sequence_lengths, int top_k, float alpha, bool softmax) -> Tensor",
    reference=_balance_loss_reference,
    triton="dskernels.routing.triton_balance:balance_loss",
    fake=lambda logits, *args: logits.new_empty((), dtype=torch.float32),
)
_balance_loss_backward = Operation(
    "balance_loss_backward(Tensor grad, Tensor logits, Tensor sequence_lengths, int top_k, float alpha, bool softmax)"
    " -> Tensor",
    reference=_balance_loss_backward_reference,
    triton="dskernels.routing.triton_balance:balance_loss_backward",
    fake=like_logits,
)


def _save_balance_loss(ctx: Any, args: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*args[:2])
    ctx.options = args[2:]


def _differentiate_balance_loss(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dlogits = _balance_loss_backward(grad, *ctx.saved_tensors, *ctx.options, impl=ctx.impl)
    return dlogits, *[None] * 4


_balance_loss.register_autograd(_differentiate_balance_loss, _save_balance_loss)
