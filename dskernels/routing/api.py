"""Public routing operations: the choice of experts, and what keeps their load even."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dskernels.dispatch import Operation, differentiating
from dskernels.reference import routing as reference
from dskernels.types import Routing
from dskernels.validate import HALF_OR_SINGLE, check_choice, check_float, check_int, check_tensor

SCORES = ("sigmoid", "softmax")


def route(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    n_groups: int = 1,
    top_groups: int = 1,
    score: str = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
    impl: str | None = None,
) -> Routing:
    """Choose the experts of each token and their weights.

    s = sigmoid(logits) or softmax(logits), in fp32. Experts are chosen by s + bias: first the `top_groups` best of
    `n_groups` groups of consecutive experts, then the `top_k` best experts inside them. A group scores the sum of the
    two largest s + bias of its experts; with softmax, as in DeepSeek-V2, the largest. The weights are of s alone, and
    the bias is never part of them: scale * s_i / (sum of the chosen s), or scale * s_i without `normalize`.

    Args:
        logits: bf16, fp16 or fp32 ``[T, E]``, last dimension contiguous.
        bias: fp32 ``[E]``, added to s for the choice; see :func:`update_bias`. It gets no gradient.
        top_k: experts a token, at most ``top_groups * E / n_groups``.
        n_groups: number of groups, a divisor of E; a group may be one expert.
        top_groups: groups that a token may choose from.
        score: ``"sigmoid"`` (DeepSeek-V3) or ``"softmax"`` (DeepSeek-V2).
        normalize: divide the weights by their sum. Where the chosen s sum to less than 1e-30 the weights are 0.
        scale: what the weights are multiplied by.
        impl: implementation to run, see :mod:`dskernels.dispatch`.

    Returns:
        Routing: weights fp32 ``[T, top_k]``; experts int32 ``[T, top_k]``, the best first; load int32 ``[E]``, how
            many choices fell on each expert; nonfinite int32 ``[]``, how many tokens had none to make. Repeated calls
            return the same bits.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, strides or devices do not fit, or a number is out of its range.

    Ties go to the smaller id, of groups as of experts. The ids of a token are always different, and from 0 to E - 1.
    A token with a NaN among its logits, or with no finite logit, gets the ids 0 to top_k - 1 with weights 0; it is
    counted in `nonfinite`, not in `load`. A NaN in the bias makes every token one of these. Otherwise an infinite
    logit or bias counts as +-2^126: an expert of bias -inf is taken last of its group. Zero tokens give empty weights
    and experts and a load of zeros.
    Differentiable in the logits through the weights. Logits that are infinite get no gradient, nor do tokens without
    a choice.
    Source: DeepSeek-V3 report (arXiv 2412.19437), eqs. 12-16; DeepSeek-V2 (arXiv 2405.04434), section 2.2.2, for
    softmax.
    """
    _check_logits(logits)
    E = logits.shape[1]
    check_int("n_groups", n_groups, low=1)
    if E % n_groups:
        raise ValueError(f"n_groups: expected a divisor of E = {E}, got {n_groups}")
    check_int("top_groups", top_groups, low=1, high=n_groups)
    _check_top_k(top_k, top_groups * (E // n_groups))
    if bias is not None:
        check_tensor("bias", bias, dtype=torch.float32, shape=(E,), like=logits)
    check_choice("score", score, SCORES)
    check_choice("normalize", normalize, (True, False))
    check_float("scale", scale)
    return Routing(*_route(logits, bias, top_k, n_groups, top_groups, score, bool(normalize), scale, impl=impl))


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
        impl: implementation to run, see :mod:`dskernels.dispatch`.

    Returns:
        `bias`. An expert of exactly the mean load, compared in whole numbers, keeps its bias.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices do not fit, or `bias` requires a gradient.

    Source: DeepSeek-V3 report, section 2.1.2, "auxiliary-loss-free load balancing"; arXiv 2408.15664.
    """
    check_tensor("bias", bias, dtype=torch.float32, shape=("E",))
    if bias.requires_grad:
        raise ValueError("bias: expected a tensor that requires no gradient, as it is written to in place")
    check_tensor("load", load, dtype=(torch.int32, torch.int64), shape=tuple(bias.shape), like=bias)
    check_float("rate", rate)
    if group is not None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
        load = load.to(torch.int64, copy=True)
        dist.all_reduce(load, group=group)
    _update_bias(bias, load, rate, impl=impl)
    return bias


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
        impl: implementation to run, see :mod:`dskernels.dispatch`.

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
    _check_logits(logits)
    _check_top_k(top_k, logits.shape[1])
    check_float("alpha", alpha)
    check_tensor("sequence_lengths", sequence_lengths, dtype=torch.int32, shape=("S",), like=logits)
    check_choice("score", score, SCORES)
    return _balance_loss(logits, sequence_lengths, top_k, alpha, score, impl=impl)


def _check_logits(logits: Any) -> None:
    check_tensor("logits", logits, dtype=HALF_OR_SINGLE, shape=("T", "E"))
    if logits.shape[1] == 0:
        raise ValueError(f"logits: expected at least one expert, got {list(logits.shape)}")


def _check_top_k(top_k: Any, allowed: int) -> None:
    check_int("top_k", top_k, low=1, high=allowed)


# ---- registration: flat arguments in, flat tensors out --------------------------------------------------------------


def _route_reference(logits, bias, top_k, n_groups, top_groups, score, normalize, scale):
    return tuple(
        reference.route(
            logits,
            bias,
            top_k=top_k,
            n_groups=n_groups,
            top_groups=top_groups,
            score=score,
            normalize=normalize,
            scale=scale,
        )
    )


def _route_backward_reference(grad, logits, weights, experts, score, normalize, scale):
    with differentiating():
        logits = logits.detach().requires_grad_()
        s, void = reference.affinities(logits, score)
        # A row whose weights are all 0 had no choice (a NaN in the bias makes all rows such), or has no gradient.
        again = reference.gates(s, void | ~weights.any(-1), experts, normalize, scale)
    return torch.autograd.grad(again, logits, grad)[0]


def _empty_routing(logits, bias, top_k, *options):
    T, E = logits.shape
    return (
        logits.new_empty((T, top_k), dtype=torch.float32),
        logits.new_empty((T, top_k), dtype=torch.int32),
        logits.new_empty(E, dtype=torch.int32),
        logits.new_empty((), dtype=torch.int32),
    )


def _update_bias_reference(bias, load, rate):
    reference.update_bias(bias, load, rate)


def _balance_loss_reference(logits, sequence_lengths, top_k, alpha, score):
    return reference.balance_loss(logits, top_k=top_k, alpha=alpha, sequence_lengths=sequence_lengths, score=score)


def _balance_loss_backward_reference(grad, logits, sequence_lengths, top_k, alpha, score):
    with differentiating():
        logits = logits.detach().requires_grad_()
        loss = _balance_loss_reference(logits, sequence_lengths, top_k, alpha, score)
    return torch.autograd.grad(loss, logits, grad)[0]


def _like_logits(grad, logits, *args):
    return logits.new_empty(logits.shape)


_route = Operation(
    "route(Tensor logits, Tensor? bias, int top_k, int n_groups, int top_groups, str score, bool normalize,"
    " float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_route_reference,
    triton="dskernels.routing.triton:route",
    fake=_empty_routing,
)
_route_backward = Operation(
    "route_backward(Tensor grad, Tensor logits, Tensor weights, Tensor experts, str score, bool normalize, float scale)"
    " -> Tensor",
    reference=_route_backward_reference,
    triton="dskernels.routing.triton:route_backward",
    fake=_like_logits,
)
_update_bias = Operation(
    "update_bias(Tensor(a!) bias, Tensor load, float rate) -> ()",
    reference=_update_bias_reference,
    triton="dskernels.routing.triton_balance:update_bias",
)
_balance_loss = Operation(
    "balance_loss(Tensor logits, Tensor sequence_lengths, int top_k, float alpha, str score) -> Tensor",
    reference=_balance_loss_reference,
    triton="dskernels.routing.triton_balance:balance_loss",
    fake=lambda logits, *args: logits.new_empty((), dtype=torch.float32),
)
_balance_loss_backward = Operation(
    "balance_loss_backward(Tensor grad, Tensor logits, Tensor sequence_lengths, int top_k, float alpha, str score)"
    " -> Tensor",
    reference=_balance_loss_backward_reference,
    triton="dskernels.routing.triton_balance:balance_loss_backward",
    fake=_like_logits,
)


def _save_route(ctx: Any, args: tuple, output: tuple[Tensor, ...]) -> None:
    logits, *_, score, normalize, scale = args
    weights, experts, _, _ = output
    ctx.save_for_backward(logits, weights, experts)
    ctx.options = score, normalize, scale


def _differentiate_route(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dlogits = _route_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options, impl=ctx.impl)
    return dlogits, *[None] * 7


def _save_balance_loss(ctx: Any, args: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*args[:2])
    ctx.options = args[2:]


def _differentiate_balance_loss(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dlogits = _balance_loss_backward(grad, *ctx.saved_tensors, *ctx.options, impl=ctx.impl)
    return dlogits, *[None] * 4


_route.register_autograd(_differentiate_route, _save_route)
_balance_loss.register_autograd(_differentiate_balance_loss, _save_balance_loss)
