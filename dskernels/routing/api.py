"""Public routing operations: which experts each token goes to, and with which weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dskernels.dispatch import Operation, differentiating
from dskernels.reference import routing as reference
from dskernels.repeated import repeated
from dskernels.types import Routing
from dskernels.validate import HALF_OR_SINGLE, check_choice, check_float, check_int, check_tensor

SCORES = ("sigmoid", "softmax")


@repeated
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
    physical: Tensor | None = None,
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
        scale: factor on the weights.
        physical: int32 ``[E, R]``, contiguous, if experts have copies: row e holds the ids of the places that compute
            expert e, padded with -1.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        Routing: weights fp32 ``[T, top_k]``; experts int32 ``[T, top_k]``, the best first; load int32 ``[E]``, how
            often each expert was chosen; nonfinite int32 ``[]``, how many tokens had nothing to choose from. Repeated
            calls return the same bits. With `physical`, `experts` are ids of places, while `load` still counts experts.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, strides or devices do not fit, or a number is out of its range.

    Ties go to the smaller id, of groups as of experts. The ids of a token are always different, and from 0 to E - 1.
    A token with a NaN among its logits, or with no finite logit, gets the ids 0 to top_k - 1 with weights 0; it is
    counted in `nonfinite`, not in `load`. A NaN in the bias makes every token one of these. Otherwise an infinite
    logit or bias counts as +-2^126: an expert of bias -inf is taken last of its group. Zero tokens give empty weights
    and experts and a load of zeros.
    The n places of an expert take turns: token t goes to entry t % n of the row, whatever other tokens do. An expert
    without a place gets -1, which :func:`permute` drops.
    Differentiable in the logits through the weights. Logits that are infinite get no gradient, nor do tokens without
    a choice.
    Source: DeepSeek-V3 report (arXiv 2412.19437), eqs. 12-16, and sections 3.4.1 and 3.4.2 for experts with copies;
    DeepSeek-V2 (arXiv 2405.04434), section 2.2.2, for softmax.
    """
    check_logits(logits)
    options = _checked(logits, bias, physical, logits.shape[1], top_k, n_groups, top_groups, score, normalize, scale)
    if physical is None:
        return Routing(*_route(logits, bias, *options, impl=impl))
    weights, _, load, nonfinite, placed = _route_replicated(logits, bias, physical, *options, impl=impl)
    return Routing(weights, placed, load, nonfinite)


@repeated
def route_hidden(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    n_groups: int = 1,
    top_groups: int = 1,
    score: str = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
    physical: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Routing, Tensor]:
    """Choose the experts of each token from its hidden state: :func:`route` of ``logits = x @ weight.T``.

    The product is summed in fp32 and its operands are exact: an fp32 operand is multiplied as the sum of three bf16
    numbers.

    Args:
        x: bf16, fp16 or fp32 ``[T, H]``, last dimension contiguous.
        weight: bf16, fp16 or fp32 ``[E, H]``, a row for each expert, last dimension contiguous.
        bias: see :func:`route`.
        top_k: see :func:`route`.
        n_groups: see :func:`route`.
        top_groups: see :func:`route`.
        score: see :func:`route`.
        normalize: see :func:`route`.
        scale: see :func:`route`.
        physical: see :func:`route`.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        The Routing, and the logits, fp32 ``[T, E]``, for :func:`balance_loss`. The routing is that of :func:`route` for
        these logits. Repeated calls return the same bits.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, strides or devices do not fit, or a number is out of its range.

    Differentiable in `x` and `weight`, through the weights and through the logits; gradients have the dtypes of `x` and
    `weight`. If a token's hidden state is not finite, neither are its logits; which of them are NaN is unspecified.
    Source: DeepSeek-V3 report (arXiv 2412.19437), eqs. 12-16.
    """
    check_tensor("x", x, dtype=HALF_OR_SINGLE, shape=("T", "H"))
    check_tensor("weight", weight, dtype=HALF_OR_SINGLE, shape=("E", x.shape[1]), like=x)
    if weight.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"weight: expected at least one expert and one column, got {list(weight.shape)}")
    options = _checked(x, bias, physical, weight.shape[0], top_k, n_groups, top_groups, score, normalize, scale)
    return _routing(_route_hidden(x, weight, bias, physical, *options, impl=impl), physical)


def _routing(results: tuple[Tensor, ...], physical: Tensor | None) -> tuple[Routing, Tensor]:
    """What `route_hidden` returns of the operation's results."""
    weights, experts, load, nonfinite, logits, placed = results
    return Routing(weights, experts if physical is None else placed, load, nonfinite), logits


def check_logits(logits: Any) -> None:
    """Check that there are logits ``[T, E]``."""
    check_tensor("logits", logits, dtype=HALF_OR_SINGLE, shape=("T", "E"))
    if logits.shape[1] == 0:
        raise ValueError(f"logits: expected at least one expert, got {list(logits.shape)}")


def check_top_k(top_k: Any, allowed: int) -> None:
    """Check that each token may have so many experts."""
    check_int("top_k", top_k, low=1, high=allowed)


def _checked(
    like: Tensor,
    bias: Any,
    physical: Any,
    n_experts: int,
    top_k: Any,
    n_groups: Any,
    top_groups: Any,
    score: Any,
    normalize: Any,
    scale: Any,
) -> tuple[int, int, int, bool, bool, float]:
    """The options of a choice, as the operations take them, once all has been looked at."""
    check_int("n_groups", n_groups, low=1)
    if n_experts % n_groups:
        raise ValueError(f"n_groups: expected a divisor of E = {n_experts}, got {n_groups}")
    check_int("top_groups", top_groups, low=1, high=n_groups)
    check_top_k(top_k, top_groups * (n_experts // n_groups))
    if bias is not None:
        check_tensor("bias", bias, dtype=torch.float32, shape=(n_experts,), like=like)
    if physical is not None:
        check_tensor("physical", physical, dtype=torch.int32, shape=(n_experts, "R"), like=like)
        if physical.shape[1] == 0 or not physical.is_contiguous():
            raise ValueError(
                f"physical: expected at least one column, contiguous, got {list(physical.shape)} with strides "
                f"{list(physical.stride())}"
            )
    check_choice("score", score, SCORES)
    check_choice("normalize", normalize, (True, False))
    check_float("scale", scale)
    return top_k, n_groups, top_groups, score == "softmax", bool(normalize), float(scale)


# ---- registration: flat arguments in, flat tensors out --------------------------------------------------------------


def _options(top_k, n_groups, top_groups, softmax, normalize, scale):
    return {
        "top_k": top_k,
        "n_groups": n_groups,
        "top_groups": top_groups,
        "score": score_name(softmax),
        "normalize": normalize,
        "scale": scale,
    }


def score_name(softmax: bool) -> str:
    """The public name of the score that an operation's `softmax` says."""
    return "softmax" if softmax else "sigmoid"


def _route_reference(logits, bias, *options):
    return tuple(reference.route(logits, bias, **_options(*options)))


def _route_replicated_reference(logits, bias, physical, *options):
    routing = reference.route(logits, bias, **_options(*options))
    return *routing, reference.place(routing.experts.long(), physical)


def _route_hidden_reference(x, weight, bias, physical, *options):
    routing, logits = reference.route_hidden(x, weight, bias, **_options(*options))
    if physical is None:
        return *routing, logits, routing.experts.new_empty(0)
    return *routing, logits, reference.place(routing.experts.long(), physical)


def _route_backward_reference(grad, logits, weights, experts, softmax, normalize, scale):
    with differentiating():
        logits = logits.detach().requires_grad_()
        s, void = reference.affinities(logits, score_name(softmax))
        # A row whose weights are all 0 had no choice (a NaN in the bias makes all rows such), or has no gradient.
        again = reference.gates(s, void | ~weights.any(-1), experts, normalize, scale)
    return torch.autograd.grad(again, logits, grad)[0]


def _gate_backward_reference(dlogits, x, weight, needs_x, needs_weight):
    wide = torch.promote_types(dlogits.dtype, torch.float32)
    dx = (dlogits @ weight.to(wide)).to(x.dtype) if needs_x else x.new_empty(0)
    dweight = (dlogits.T @ x.to(wide)).to(weight.dtype) if needs_weight else weight.new_empty(0)
    return dx, dweight


def _empty_routing(logits, bias, top_k, *options):
    T, E = logits.shape
    return (
        logits.new_empty((T, top_k), dtype=torch.float32),
        logits.new_empty((T, top_k), dtype=torch.int32),
        logits.new_empty(E, dtype=torch.int32),
        logits.new_empty((), dtype=torch.int32),
    )


def _empty_replicated(logits, bias, physical, top_k, *options):
    routing = _empty_routing(logits, bias, top_k)
    return *routing, torch.empty_like(routing[1])


def _empty_hidden(x, weight, bias, physical, top_k, *options):
    logits = x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)
    routing = _empty_routing(logits, bias, top_k)
    experts = routing[1]
    return *routing, logits, experts.new_empty(0) if physical is None else torch.empty_like(experts)


def _empty_gate_gradients(dlogits, x, weight, needs_x, needs_weight):
    return x.new_empty(x.shape if needs_x else 0), weight.new_empty(weight.shape if needs_weight else 0)


def like_logits(grad: Tensor, logits: Tensor, *args: object) -> Tensor:
    """What the gradient of the logits is."""
    return logits.new_empty(logits.shape)


CHOICE = "int top_k, int n_groups, int top_groups, bool softmax, bool normalize, float scale"

_route = Operation(
    f"route(Tensor logits, Tensor? bias, {CHOICE}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_route_reference,
    triton="dskernels.routing.triton:route",
    hopper="dskernels.routing.hopper:route",
    fake=_empty_routing,
)
_route_replicated = Operation(
    f"route_replicated(Tensor logits, Tensor? bias, Tensor physical, {CHOICE})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_route_replicated_reference,
    triton="dskernels.routing.triton:route_replicated",
    hopper="dskernels.routing.hopper:route_replicated",
    fake=_empty_replicated,
)
_route_hidden = Operation(
    f"route_hidden(Tensor x, Tensor weight, Tensor? bias, Tensor? physical, {CHOICE})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_route_hidden_reference,
    triton="dskernels.routing.triton:route_hidden",
    hopper="dskernels.routing.hopper:route_hidden",
    fake=_empty_hidden,
)
_route_backward = Operation(
    "route_backward(Tensor grad, Tensor logits, Tensor weights, Tensor experts, bool softmax, bool normalize,"
    " float scale) -> Tensor",
    reference=_route_backward_reference,
    triton="dskernels.routing.triton:route_backward",
    hopper="dskernels.routing.hopper:route_backward",
    fake=like_logits,
)
_gate_backward = Operation(
    "gate_backward(Tensor dlogits, Tensor x, Tensor weight, bool needs_x, bool needs_weight) -> (Tensor, Tensor)",
    reference=_gate_backward_reference,
    triton="dskernels.routing.triton_gate:gate_backward",
    hopper="dskernels.routing.hopper_gate:gate_backward",
    fake=_empty_gate_gradients,
)


def _save_route(ctx: Any, args: tuple, output: tuple[Tensor, ...]) -> None:
    logits, *_, softmax, normalize, scale = args
    weights, experts, *_ = output
    ctx.save_for_backward(logits, weights, experts)
    ctx.options = softmax, normalize, scale
    ctx.arity = len(args)


def _differentiate_route(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dlogits = _route_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options, impl=ctx.impl)
    return dlogits, *[None] * (ctx.arity - 1)


def _save_route_hidden(ctx: Any, args: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, *_, softmax, normalize, scale = args
    weights, experts, _, _, logits, _ = output
    ctx.save_for_backward(x, weight, logits, weights, experts)
    ctx.options = softmax, normalize, scale
    ctx.arity = len(args)
    ctx.set_materialize_grads(False)


def _differentiate_route_hidden(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    dweights, _, _, _, dlogits, _ = grads
    x, weight, logits, weights, experts = ctx.saved_tensors
    if dweights is not None:
        chosen = _route_backward(dweights.contiguous(), logits, weights, experts, *ctx.options, impl=ctx.impl)
        dlogits = chosen if dlogits is None else dlogits + chosen
    needs = ctx.needs_input_grad[:2]
    if dlogits is None or not any(needs):
        return (None,) * ctx.arity
    gradients = _gate_backward(dlogits.contiguous(), x, weight, *needs, impl=_unless_hopper(ctx.impl))
    dx, dweight = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    return dx, dweight, *[None] * (ctx.arity - 2)


def _unless_hopper(impl: str | None) -> str | None:
    """The implementation of a product that Hopper's leaves to the portable kernel where that is faster."""
    return None if impl == "hopper" else impl


_route.register_autograd(_differentiate_route, _save_route)
_route_replicated.register_autograd(_differentiate_route, _save_route)
_route_hidden.register_autograd(_differentiate_route_hidden, _save_route_hidden)
