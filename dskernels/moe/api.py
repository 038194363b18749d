"""Public operations of the expert block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dskernels.dispatch import Operation, differentiating
from dskernels.later import waiting_for
from dskernels.moe.config import MAX_EXPERTS
from dskernels.moe.network import (
    BLOCK,
    check_network,
    check_options,
    flat,
    flat_options,
    needs_gradient,
)
from dskernels.moe.packed import KEPT, PACKED, empty_kept
from dskernels.moe.split import split
from dskernels.reference import experts as experts_reference
from dskernels.reference import moe as reference
from dskernels.reference.experts import with_shared
from dskernels.repeated import repeated
from dskernels.types import Fp8Tensor, Permuted, Routing
from dskernels.validate import HALF_OR_SINGLE, check_bool, check_int, check_tensor

IDS = (torch.int32, torch.int64)


@repeated
def permute(x: Tensor, experts: Tensor, n_experts: int, *, impl: str | None = None) -> Permuted:
    """Copy each token's row once for every expert it goes to, sorted by expert.

    ``permuted.x[permuted.index[t, j]] = x[t]``. The order comes from a stable counting sort on the device: the rows of
    expert e are ``offsets[e]`` to ``offsets[e + 1]``, in the order of the tokens (choices of one token in order of j).

    Args:
        x: bf16, fp16 or fp32 ``[T, H]``, last dimension contiguous.
        experts: int32 or int64 ``[T, k]``, ids of the experts; a choice whose id is -1, or any other outside
            ``[0, n_experts)``, is dropped.
        n_experts: number of experts E, 1 to 1024.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        Permuted: x ``[T * k, H]``, whatever the ids are, with zeros in the rows from ``offsets[E]`` on; offsets int32
        ``[E + 1]``; index int32 ``[T, k]``, -1 for a dropped choice. Exact: all implementations return the same bits.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, strides or devices do not fit, or `n_experts` is out of range.

    Differentiable in `x`: dx[t] sums the gradients of its rows, in fp32 in the order of j. T = 0 gives no rows.
    Source: DeepSeek-V3 report (arXiv 2412.19437), eq. 12, whose sum is taken expert by expert.
    """
    check_tensor("x", x, dtype=HALF_OR_SINGLE, shape=("T", "H"))
    check_tensor("experts", experts, dtype=IDS, shape=(x.shape[0], "k"), like=x)
    check_int("n_experts", n_experts, low=1, high=MAX_EXPERTS)
    return Permuted(*_permute(x, experts, n_experts, impl=impl))


@repeated
def combine(y: Tensor, permuted: Permuted, weights: Tensor, *, impl: str | None = None) -> Tensor:
    """Sum the outputs of each token's experts: ``out[t] = sum over j of weights[t, j] * y[index[t, j]]``.

    Args:
        y: bf16, fp16 or fp32 ``[T * k, H]``, the outputs in the order of `permuted`, last dimension contiguous.
        permuted: what :func:`permute` returned; only its offsets and index are used.
        weights: fp32 ``[T, k]``, see :class:`dskernels.Routing`.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        ``[T, H]`` in y's dtype, summed in fp32 in the order of j and rounded once: each call returns the same bits. A
        dropped choice (index -1, or any other index outside `y`) adds nothing; a token without choices is zero.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, strides or devices do not fit.

    Differentiable in `y` and `weights`. The gradient of rows from ``offsets[E]`` on, and of the weight of a dropped
    choice, is zero.
    Source: DeepSeek-V3 report (arXiv 2412.19437), eq. 12.
    """
    check_tensor("y", y, dtype=HALF_OR_SINGLE, shape=("T * k", "H"))
    if not isinstance(permuted, Permuted):
        raise TypeError(f"permuted: expected a Permuted (see dskernels.permute), got {type(permuted).__name__}")
    check_tensor("permuted.offsets", permuted.offsets, dtype=torch.int32, shape=("E + 1",), like=y)
    check_tensor("permuted.index", permuted.index, dtype=torch.int32, shape=("T", "k"), like=y)
    if permuted.index.numel() != y.shape[0]:
        shape = list(permuted.index.shape)
        raise ValueError(f"y: expected T * k rows for permuted.index of shape {shape}, got {y.shape[0]}")
    check_tensor("weights", weights, dtype=torch.float32, shape=tuple(permuted.index.shape), like=y)
    return _combine(y, permuted.offsets, permuted.index, weights, impl=impl)


@repeated
def fused_experts(
    x: Tensor,
    w13: Tensor | Fp8Tensor,
    w2: Tensor | Fp8Tensor,
    routing: Routing,
    *,
    shared: tuple[Tensor | Fp8Tensor, Tensor | Fp8Tensor] | None = None,
    n_shared: int = 0,
    quantized: Fp8Tensor | None = None,
    fp8: bool = False,
    recompute: bool | None = None,
    keep: str = "input",
    impl: str | None = None,
) -> Tensor:
    """Run the whole expert block: every token through its experts, and all through the shared one.

    out[t] = shared(x[t]) + sum over j of routing.weights[t, j] * expert[routing.experts[t, j]](x[t]), with
    expert(x) = w2 @ (silu(gate) * up), gate and up being the halves of w13 @ x.

    With `fp8`, or with fp8 weights, all products run in e4m3 like those of :func:`dskernels.fp8_linear`: activations
    are quantised in 1x128 tiles, weights in 128x128 blocks, and for the gradients of weights both operands once more,
    in tiles of 128 tokens of one expert. Quantised copies of weights are kept as :func:`dskernels.fp8_linear` keeps
    them.

    Args:
        x: bf16, fp16 or fp32 ``[T, H]``, last dimension contiguous.
        w13: ``[E, 2 * I, H]``, the I rows of the gate first, then those of up, E from 1 to 1024; in the dtype of `x`,
            or with `fp8` in any of bf16, fp16 and fp32; last dimension contiguous. Or an `Fp8Tensor` in 128x128 blocks.
        w2: ``[E, H, I]``, likewise.
        routing: what :func:`dskernels.route` returned; its weights, fp32 ``[T, k]``, and its experts, int32 or int64
            ``[T, k]``, are used. Ids outside ``[0, E)`` are dropped.
        shared: ``(w13 [2 * I', H], w2 [H, I'])`` of the shared expert, likewise. It runs in the launches of the routed
            experts if I' = I and its weights follow theirs in memory (``w13 = all_w13[:E]`` and
            ``shared = (all_w13[E], all_w2[E])``), provided that nothing is kept for a backward and that the weights are
            not quantised inside.
        n_shared: instead of `shared`, how many experts at the end of `w13` and `w2` are shared ones: every token takes
            them, with weight 1, in the launches of the others. The ids of the routing are then below E - n_shared. A
            shared network n times as wide as a routed expert is the same as n such experts.
        quantized: `x` already quantised, ``[T, H]`` in 1x128 tiles, as :func:`dskernels.quantize` or
            :func:`dskernels.rmsnorm_quantize` returns it: products in e4m3 then use it instead of quantising `x`.
            Gradients go to `x`.
        fp8: quantise, inside, whatever is not quantised yet.
        recompute: if True, the forward keeps nothing but the arguments, and the backward computes ``w13 @ x`` again; if
            False, ``w13 @ x`` is kept, ``[T * k, 2 * I]`` and ``[T, 2 * I']``. The outputs of the experts are never
            kept. None keeps it on a GPU, but not on the CPU, where the reference runs the forward again in any case.
        keep: with `fp8`, the format in which ``w13 @ x`` is kept: ``"input"`` is x's dtype, ``"fp8"`` is e4m3, half the
            bytes. With ``"fp8"``, the gradient of the SwiGLU, and the output of the SwiGLU that enters the gradient of
            `w2`, are those of the quantised values, also if these are computed again.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        ``[T, H]`` in x's dtype. Products are summed in fp32, and so are the experts' outputs, in the order of j; the
        kernels round intermediate results between products to x's dtype.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, tiles, strides or devices do not fit.

    Differentiable in `x`, ``routing.weights`` and all weights that are not `Fp8Tensor`s. The gradient of a dropped
    choice's weight is zero. T = 0 gives an empty result.
    Source: DeepSeek-V3 report (arXiv 2412.19437), eq. 12 and figure 6; Shazeer, arXiv 2002.05202; for the backward,
    SonicMoE (arXiv 2512.14080).
    """
    check_tensor("x", x, dtype=HALF_OR_SINGLE, shape=("T", "H"))
    if shared is not None and not (isinstance(shared, tuple) and len(shared) == 2):
        raise TypeError(f"shared: expected None or a tuple (w13, w2), got {type(shared).__name__}")
    check_int("n_shared", n_shared, low=0)
    if n_shared and shared is not None:
        raise ValueError(f"n_shared: expected 0 where `shared` is given, got {n_shared}")
    given = (w13, w2, *(shared or ()))
    check_bool("fp8", fp8)
    fp8 = fp8 or any(isinstance(weight, Fp8Tensor) for weight in given)
    check_network(("w13", w13), ("w2", w2), x, fp8, stacked=True)
    check_int("w13: number of experts", w13.shape[0], low=1, high=MAX_EXPERTS)
    if n_shared >= w13.shape[0]:
        raise ValueError(f"n_shared: expected fewer than the {w13.shape[0]} experts of w13, got {n_shared}")
    if shared is not None:
        check_network(("shared[0]", shared[0]), ("shared[1]", shared[1]), x, fp8, stacked=False)
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a Routing (see dskernels.route), got {type(routing).__name__}")
    weights, experts = routing.weights, routing.experts
    check_tensor("routing.weights", weights, dtype=torch.float32, shape=(x.shape[0], "k"), like=x)
    check_tensor("routing.experts", experts, dtype=IDS, shape=tuple(weights.shape), like=x)
    check_options(x, quantized, recompute, keep)
    parts = [part for weight in given for part in flat(weight)]
    differentiable = needs_gradient((x, weights, *parts))
    if n_shared and differentiable:
        weights, experts = with_shared(weights, experts, w13.shape[0], n_shared)
        n_shared = 0
    block = (x, *parts[:4], weights, experts, *(parts[4:] or [None] * 4))
    options = flat_options(x, quantized, fp8, recompute, keep, differentiable)
    return _fused_experts(*block, fp8, *options, n_shared, impl=impl)[0]


# ---- registration: flat arguments in, flat tensors out --------------------------------------------------------------


def _permute_fake(x: Tensor, experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    offsets, index = (experts.new_empty(shape, dtype=torch.int32) for shape in ((n_experts + 1,), experts.shape))
    return x.new_empty(experts.shape[0] * experts.shape[1], x.shape[1]), offsets, index


def _permute_backward_reference(dy: Tensor, index: Tensor) -> Tensor:
    ones = torch.ones(index.shape, device=index.device)
    return reference.combine(dy, Permuted(dy, index, index), ones)


_permute = Operation(
    "permute(Tensor x, Tensor experts, int n_experts) -> (Tensor, Tensor, Tensor)",
    reference=lambda x, experts, n_experts: tuple(reference.permute(x, experts, n_experts)),
    triton="dskernels.moe.triton:permute",
    fake=_permute_fake,
)
_permute_backward = Operation(
    "permute_backward(Tensor dy, Tensor index) -> Tensor",
    reference=_permute_backward_reference,
    triton="dskernels.moe.triton:permute_backward",
    fake=lambda dy, index: dy.new_empty(index.shape[0], dy.shape[1]),
)


def _save_permute(ctx: Any, args: tuple, output: tuple) -> None:
    _, offsets, index = output
    ctx.mark_non_differentiable(offsets, index)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(index)


def _permute_gradient(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    return None if dy is None else _permute_backward(dy.contiguous(), index, impl=ctx.impl), None, None


_permute.register_autograd(_permute_gradient, _save_permute)


def _combine_reference(y: Tensor, offsets: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return reference.combine(y, Permuted(y, offsets, index), weights)


def _combine_backward_reference(dout, y, offsets, index, weights):
    if index.shape[1] == 0:  # without choices the result is a constant, which autograd could not differentiate
        return y.new_zeros(y.shape), weights.new_zeros(weights.shape)
    y, weights = (t.detach().requires_grad_() for t in (y, weights))
    with differentiating():
        out = _combine_reference(y, offsets, index, weights)
    return torch.autograd.grad(out, (y, weights), dout)


_combine = Operation(
    "combine(Tensor y, Tensor offsets, Tensor index, Tensor weights) -> Tensor",
    reference=_combine_reference,
    triton="dskernels.moe.triton:combine",
    fake=lambda y, offsets, index, weights: y.new_empty(index.shape[0], y.shape[1]),
)
_combine_backward = Operation(
    "combine_backward(Tensor dout, Tensor y, Tensor offsets, Tensor index, Tensor weights) -> (Tensor, Tensor)",
    reference=_combine_backward_reference,
    triton="dskernels.moe.triton:combine_backward",
    fake=lambda dout, y, offsets, index, weights: (y.new_empty(y.shape), weights.new_empty(weights.shape)),
)


def _save_combine(ctx: Any, args: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*args)


def _combine_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dy, dweights = _combine_backward(dout.contiguous(), *ctx.saved_tensors, impl=ctx.impl)
    return dy, None, None, dweights


_combine.register_autograd(_combine_gradient, _save_combine)


def _fused_experts_fake(x, w13, w13_scale, w2, w2_scale, weights, experts, shared_w13, *args):
    fp8, keep = args[3:5]
    packed, kept = fp8 and bool(keep & PACKED), bool(keep & KEPT)
    gate_up = empty_kept(x, experts.shape[0] * experts.shape[1] if kept else 0, w13.shape[1], packed)
    if shared_w13 is None:
        return x.new_empty(x.shape), gate_up, x.new_empty(0, 0)
    return x.new_empty(x.shape), gate_up, empty_kept(x, x.shape[0] if kept else 0, shared_w13.shape[0], packed)


def _fused_experts_backward_fake(dout, *args):
    *block, gate_up, shared_gate_up, fp8, needs = args
    return tuple(
        block[i].new_empty(block[i].shape) if needed else dout.new_empty(0)
        for i, needed in zip(DIFFERENTIABLE, needs, strict=True)
    )


# Positions of x, w13, w2, the routing weights, and both shared weights among the operation's arguments.
DIFFERENTIABLE = (0, 1, 3, 5, 7, 9)
# The position of each weight, and of its scale. A weight with a scale came in quantised, and has no gradient.
SCALES = {1: 2, 3: 4, 7: 8, 9: 10}

_fused_experts = Operation(
    f"fused_experts({BLOCK}, bool fp8, int keep, Tensor? quantized, Tensor? quantized_scale, int n_shared)"
    " -> (Tensor, Tensor, Tensor)",
    reference=experts_reference.fused_experts,
    triton="dskernels.moe.triton_experts:fused_experts",
    hopper="dskernels.moe.hopper:fused_experts",
    fake=_fused_experts_fake,
)
_fused_experts_backward = Operation(
    f"fused_experts_backward(Tensor dout, {BLOCK}, Tensor gate_up, Tensor shared_gate_up, bool fp8, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=experts_reference.fused_experts_backward,
    triton="dskernels.moe.triton_experts:fused_experts_backward",
    hopper="dskernels.moe.hopper:fused_experts_backward",
    fake=_fused_experts_backward_fake,
)


def _save_experts(ctx: Any, args: tuple, output: tuple) -> None:
    *block, ctx.fp8, _, _, _, _ = args
    _, gate_up, shared_gate_up = output
    # If the caller collects the gradients of weights, the backward computes only those of the inputs, see `split`.
    trained = [i for i, scale in SCALES.items() if block[i] is not None and block[scale] is None]
    ctx.waiting = waiting_for(*(block[i] for i in trained if block[i].requires_grad))
    ctx.mark_non_differentiable(gate_up, shared_gate_up)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*block, gate_up, shared_gate_up)


def _experts_gradient(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    block = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] and (i not in SCALES or block[SCALES[i]] is None) for i in DIFFERENTIABLE]
    result: list[Tensor | None] = [None] * _fused_experts.arity
    if dout is not None and any(needs) and ctx.waiting is not None:
        result[0], result[5] = split(ctx.waiting, dout.contiguous(), block, ctx.fp8, needs, ctx.impl)
    elif dout is not None and any(needs):
        gradients = _fused_experts_backward(dout.contiguous(), *block, ctx.fp8, needs, impl=ctx.impl)
        for i, needed, gradient in zip(DIFFERENTIABLE, needs, gradients, strict=True):
            result[i] = gradient if needed else None
    return tuple(result)


_fused_experts.register_autograd(_experts_gradient, _save_experts)
