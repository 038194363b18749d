"""The expert block, forward and backward, put together from steps that each implementation provides (`Steps`).

A network is the routed experts, or the shared expert, which takes every token. Let X be the rows of its batch (row r is
token ``source[r] // top_k``), w their routing weights, and dO the rows of the output's gradient in the same order. Then

    forward     G, U = X W13^T            A = silu(G) * U        out = sum over a token's rows of w * (A W2^T)
    backward    dA' = dO W2               dw = <dA', A>          (dA' is not yet multiplied by w)
                dG, dU = gradient of the SwiGLU at w * dA'       dX = [dG dU] W13, summed over a token's rows
                dW13 = [dG dU]^T X        dW2 = dO^T (w * A)

In this form, the backward does not need the outputs of the experts, A W2^T (SonicMoE, arXiv 2512.14080). What is kept
for it is G and U; or nothing, and they are computed again.

Sorting, the weighted sum and the gradient of the SwiGLU are the portable kernels of this folder, whichever
implementation computes the products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dskernels.gemm.weights import done_with
from dskernels.moe.config import MAX_EXPERTS
from dskernels.moe.packed import DIFFERENTIATED, KEPT, PACKED, is_packed
from dskernels.moe.triton import weighted_sum
from dskernels.moe.triton_sort import append_choices, sort
from dskernels.moe.triton_swiglu import swiglu_backward
from dskernels.types import Fp8Tensor

Operand = Tensor | Fp8Tensor


@dataclass(frozen=True)
class Batch:
    """How the rows of a network belong to tokens and experts. The rows of routed experts are sorted by expert; those of
    the shared expert are the tokens, in their order, and need neither index nor source.

    Attributes:
        rows: number of rows.
        top_k: choices of a token.
        offsets: int32 ``[E + 1]``, where the rows of each expert begin, and their end; for the shared expert only if
            the implementation's products require it.
        index: int32 ``[T, k]``, the row of each choice, -1 if it was dropped.
        source: int32 ``[rows]``, the choice of each row (token * k + j); -1 after the last expert's rows, where rows
            are never read.
    """

    rows: int
    top_k: int = 1
    offsets: Tensor | None = None
    index: Tensor | None = None
    source: Tensor | None = None


class Rows(NamedTuple):
    """The rows of a batch: `data` itself, or with a `source` its rows gathered, row r being
    ``data[source[r] // top_k]``."""

    data: Operand
    source: Tensor | None = None


class Network(NamedTuple):
    """Weights of the routed experts, stacked, or of the shared expert: data, and scales if they are in e4m3."""

    w13: Tensor
    w13_scale: Tensor | None
    w2: Tensor
    w2_scale: Tensor | None


class Block(NamedTuple):
    """The arguments of a block without a gradient: an implementation may compute it as a whole (`Steps.few`).

    Attributes:
        x: the tokens ``[T, H]``, as the products take them.
        dtype: dtype of the output.
        network: the routed experts; every token takes the last `n_shared` of them.
        weights: routing weights fp32 ``[T, k]``.
        experts: ids ``[T, k]``.
        n_shared: number of shared experts at the end of `network`.
        shared: the shared expert, if it is not in `network`.
    """

    x: Operand
    dtype: torch.dtype
    network: Network
    weights: Tensor
    experts: Tensor
    n_shared: int
    shared: Network | None


@dataclass(frozen=True)
class Steps:
    """What an implementation of the block provides, for operands of one kind (plain, or e4m3).

    Attributes:
        operand: activations as the products take them: as they are, or quantised.
        every_token: the batch of the shared expert, given the tokens.
        rows: operands of tokens as rows of a batch: copied to the rows of their experts, or left to the product to
            gather.
        weight: a weight, or its transpose if the third argument is True, as the products take it; given data and scale.
        product: each row times its expert's weight, in the given dtype.
        hidden: A = silu(gate) * up as an operand, given gate and up ``[rows, 2I]``; rows after the last expert's may be
            left undefined.
        kept: gate and up ``[rows, 2I]`` in the format in which they are kept for the backward.
        hidden_and_kept: both `hidden` and `kept`.
        gradient: the gradient of the SwiGLU, given what was kept, dA', the batch and the routing weights (None for the
            shared expert). It returns [dG dU] as an operand; [dG dU] and w * A as rows for `wgrad`; and the gradient
            of the routing weights.
        dispatched: the gradient of the output as an operand, from which `rows` makes dO.
        wgrad: the gradient of a weight, given the rows of both operands, the batch and the weight.
        wgrad_requantizes: whether `wgrad` takes unquantised tokens, since it quantises them along each expert's rows.
        few: computes the output ``[T, H]`` of a whole block of a few tokens; returns None for blocks that it does not
            take.
    """

    operand: Callable[[Tensor], Operand]
    every_token: Callable[[Tensor], Batch]
    rows: Callable[[Operand, Batch], Rows]
    weight: Callable[[Tensor, Tensor | None, bool], Operand]
    product: Callable[[Rows, Operand, Batch, torch.dtype], Tensor]
    hidden: Callable[[Tensor, Batch], Operand]
    kept: Callable[[Tensor], Tensor]
    hidden_and_kept: Callable[[Tensor, Batch], tuple[Operand, Tensor]]
    gradient: Callable[[Tensor, Tensor, Batch, Tensor | None], tuple[Operand, Rows, Rows, Tensor | None]]
    dispatched: Callable[[Tensor], Operand]
    wgrad: Callable[[Rows, Rows, Batch, Tensor], Tensor]
    wgrad_requantizes: bool
    few: Callable[[Block], Tensor | None] | None = None


def forward(
    steps: Steps,
    x: Tensor,
    routed: Network,
    weights: Tensor,
    experts: Tensor,
    shared: Network | None,
    keep: bool,
    differentiated: bool,
    quantized: Fp8Tensor | None,
    n_shared: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output [T, H]; gate and up of the routed experts, and of the shared one (without rows if not kept).

    Every token takes the last `n_shared` experts. If nothing is kept, a shared expert whose weights follow those of the
    routed ones in memory is treated as one more of these.

    `Steps.few` rounds in other places. It is therefore not used if a backward follows (`differentiated`), even if
    nothing is kept: the output has to have the same bits whether gate and up are kept or computed again.

    `quantized` is `x` as the products take it, if it has been quantised already.
    """
    a = steps.operand(x) if quantized is None else quantized
    of_shared = steps.kept(x.new_empty(0, 0 if shared is None else shared.w13.shape[0]))
    if shared is not None and not keep and (together := _one_stack(steps, routed, shared)) is not None:
        routed, shared, n_shared = together, None, 1
    if steps.few is not None and not keep and not differentiated:
        out = steps.few(Block(a, x.dtype, routed, weights, experts, n_shared, shared))
        if out is not None:
            return out, steps.kept(x.new_empty(0, routed.w13.shape[1])), of_shared
    if n_shared:
        experts, weights = append_choices(experts, weights, routed.w13.shape[0] - n_shared, n_shared)

    shared_gate_up, residual = of_shared, None
    if shared is not None:
        residual, shared_gate_up = network_forward(steps, a, shared, steps.every_token(x), x.dtype, keep)
    batch, index = routed_batch(experts, routed)
    y, gate_up = network_forward(steps, a, routed, batch, x.dtype, keep)
    return weighted_sum(y, index, weights, residual), gate_up, shared_gate_up


def backward(
    steps: Steps,
    dout: Tensor,
    x: Tensor,
    routed: Network,
    weights: Tensor,
    experts: Tensor,
    shared: Network | None,
    gate_up: Tensor,
    shared_gate_up: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, w13, w2, the routing weights, and the shared w13 and w2; empty for those that are not needed."""
    needs_dx, needs_dw13, needs_dw2, needs_dweights, needs_shared_dw13, needs_shared_dw2 = needs
    da = steps.dispatched(dout)
    a = None if gate_up.shape[0] > 0 else steps.operand(x)
    dx = dw13 = dw2 = dweights = shared_dw13 = shared_dw2 = None
    if shared is not None and (needs_dx or needs_shared_dw13 or needs_shared_dw2):
        wanted = needs_dx, needs_shared_dw13, needs_shared_dw2
        dx, shared_dw13, shared_dw2, _ = network_backward(
            steps, dout, da, x, a, shared, steps.every_token(x), shared_gate_up, None, wanted, None
        )
    if needs_dx or needs_dw13 or needs_dw2 or needs_dweights:
        batch, _ = routed_batch(experts, routed)
        wanted = needs_dx, needs_dw13, needs_dw2
        dx, dw13, dw2, dweights = network_backward(
            steps, dout, da, x, a, routed, batch, gate_up, weights.contiguous(), wanted, dx
        )
    gradients = (dx, dw13, dw2, dweights if needs_dweights else None, shared_dw13, shared_dw2)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def network_forward(
    steps: Steps, a: Operand, network: Network, batch: Batch, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor]:
    """The rows that one network makes, not yet weighted; and gate and up as kept (without rows if not `keep`)."""
    gate_up = _up(steps, a, network, batch, dtype)
    if keep:
        hidden, kept = steps.hidden_and_kept(gate_up, batch)
    else:
        hidden, kept = steps.hidden(gate_up, batch), steps.kept(gate_up[:0])
    del gate_up
    return steps.product(Rows(hidden), steps.weight(network.w2, network.w2_scale, False), batch, dtype), kept


def network_backward(
    steps: Steps,
    dout: Tensor,
    da: Operand,
    x: Tensor,
    a: Operand | None,
    network: Network,
    batch: Batch,
    gate_up: Tensor,
    weights: Tensor | None,
    needs: tuple[bool, bool, bool],
    residual: Tensor | None,
    added_up: bool = True,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w13, w2 and the routing weights, for one network.

    `da` and `a` are `dout` and `x` as the products take them; `a` is given if `gate_up` was not kept. `residual` is
    added to the gradient of x. Without `added_up`, that gradient is not summed over each token's rows but returned row
    by row.

    Tensors with a row per choice are most of the memory, so each is freed as soon as it is no longer needed.
    """
    needs_dx, needs_dw13, needs_dw2 = needs
    if a is not None:
        gate_up = gate_up_again(steps, a, network, batch, x.dtype)
    dy = steps.rows(da, batch)
    dhidden = gradient_of_hidden(steps, dy, network, batch, x.dtype)
    operand, dgate_up, hidden, dweights = steps.gradient(gate_up, dhidden, batch, weights)
    del gate_up, dhidden
    dx = dw13 = dw2 = None
    if needs_dw2:
        dy = Rows(dout, batch.source) if steps.wgrad_requantizes else dy
        dw2 = gradient_of_weight(steps, dy, hidden, batch, network.w2)
    del dy, hidden
    if needs_dx:
        dx = gradient_of_tokens(steps, operand, network, batch, x.dtype, residual, added_up)
    if needs_dw13:
        dw13 = gradient_of_weight(steps, dgate_up, rows_for_wgrad(steps, x, batch), batch, network.w13)
    return dx, dw13, dw2, dweights


def gradient_of_weight(steps: Steps, x: Rows, y: Rows, batch: Batch, weight: Tensor) -> Tensor:
    """The gradient of a weight [E?, N, K], x^T y for the rows of each expert; then it announces that the e4m3 copies of
    the weight are not needed any more (`done_with`)."""
    gradient = steps.wgrad(x, y, batch, weight)
    if steps.weight is not plain_weight:
        done_with(weight)
    return gradient


def gate_up_again(steps: Steps, a: Operand, network: Network, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Gate and up computed again, in the format in which they would have been kept."""
    return steps.kept(_up(steps, a, network, batch, dtype))


def gradient_of_hidden(steps: Steps, dy: Rows, network: Network, batch: Batch, dtype: torch.dtype) -> Tensor:
    """dA', the gradient of the output of the SwiGLU, not yet multiplied by routing weights."""
    return steps.product(dy, steps.weight(network.w2, network.w2_scale, True), batch, dtype)


def gradient_of_tokens(
    steps: Steps,
    dgate_up: Operand,
    network: Network,
    batch: Batch,
    dtype: torch.dtype,
    residual: Tensor | None,
    added_up: bool = True,
) -> Tensor:
    """dX, summed over each token's rows together with `residual`; without `added_up` that of each row."""
    dx = steps.product(Rows(dgate_up), steps.weight(network.w13, network.w13_scale, True), batch, dtype)
    return weighted_sum(dx, batch.index, None, residual) if added_up and batch.index is not None else dx


def rows_for_wgrad(steps: Steps, tokens: Tensor, batch: Batch) -> Rows:
    """The rows of tokens as `Steps.wgrad` takes them."""
    return Rows(tokens, batch.source) if steps.wgrad_requantizes else steps.rows(tokens, batch)


def _one_stack(steps: Steps, routed: Network, shared: Network) -> Network | None:
    """The weights of both networks as one stack, if they already are one in memory and the products take them as they
    are; otherwise None."""
    quantized_inside = routed.w13_scale is None and steps.weight is not plain_weight
    if routed.w13.shape[0] >= MAX_EXPERTS or quantized_inside:
        return None
    stacks = [_with_next(stack, matrix) for stack, matrix in zip(routed, shared, strict=True)]
    if any(both is None and stack is not None for both, stack in zip(stacks, routed, strict=True)):
        return None
    w13, w13_scale, w2, w2_scale = stacks
    return None if w13 is None or w2 is None else Network(w13, w13_scale, w2, w2_scale)


def _with_next(stack: Tensor | None, matrix: Tensor | None) -> Tensor | None:
    """`stack` [E, N, K] extended by `matrix` [N, K] if that lies directly after it in memory, otherwise None."""
    if stack is None or matrix is None or stack.shape[0] == 0 or stack.dtype != matrix.dtype:
        return None
    if stack.shape[1:] != matrix.shape or stack.stride()[1:] != matrix.stride():
        return None
    follows = matrix.data_ptr() == stack.data_ptr() + stack.shape[0] * stack.stride(0) * stack.element_size()
    if not follows or stack.untyped_storage().data_ptr() != matrix.untyped_storage().data_ptr():
        return None
    return stack.as_strided((stack.shape[0] + 1, *stack.shape[1:]), stack.stride(), stack.storage_offset())


def routed_batch(experts: Tensor, network: Network, first: int = 0) -> tuple[Batch, Tensor]:
    """The batch of the routed experts, whose ids begin at `first`, and its index [T, k]."""
    offsets, index, source = sort(experts, network.w13.shape[0], first)
    return Batch(source.shape[0], experts.shape[1], offsets, index, source), index


def _up(steps: Steps, a: Operand, network: Network, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Gate and up, [rows, 2I]."""
    return steps.product(steps.rows(a, batch), steps.weight(network.w13, network.w13_scale, False), batch, dtype)


# ---- the registered operations --------------------------------------------------------------------------------------


class Kinds(NamedTuple):
    """An implementation's steps for plain operands, for operands in e4m3, and for these with gate and up kept in
    e4m3."""

    plain: Steps
    quantized: Steps
    packing: Steps

    def chosen(self, fp8: bool, packed: bool) -> Steps:
        """The steps for products in e4m3 or not, and for gate and up kept packed or not (see `packed`)."""
        return self.packing if fp8 and packed else self.quantized if fp8 else self.plain


def operations(kinds: Kinds) -> tuple[Callable, Callable]:
    """`fused_experts` and its backward, with the flat arguments of the registered operations."""

    def fused_experts(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *block, fp8, keep, data, scale, n_shared = args
        given = None if data is None or scale is None else Fp8Tensor(data, scale)
        steps = kinds.chosen(fp8, bool(keep & PACKED))
        kept, differentiated = bool(keep & KEPT), bool(keep & DIFFERENTIATED)
        return forward(steps, *block_of(*block), kept, differentiated, given, n_shared)

    def fused_experts_backward(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *block, gate_up, shared_gate_up, fp8, needs = args
        steps = kinds.chosen(fp8, is_packed(gate_up))
        return backward(steps, dout, *block_of(*block), gate_up, shared_gate_up, needs)

    return fused_experts, fused_experts_backward


def dense_operations(kinds: Kinds) -> tuple[Callable, Callable]:
    """`feed_forward` and its backward, with flat arguments likewise: one network, which every token takes."""

    def feed_forward(x, w13, w13_scale, w2, w2_scale, fp8, keep, data, scale):
        steps, network = kinds.chosen(fp8, bool(keep & PACKED)), Network(w13, w13_scale, w2, w2_scale)
        a = steps.operand(x) if data is None or scale is None else Fp8Tensor(data, scale)
        return network_forward(steps, a, network, steps.every_token(x), x.dtype, bool(keep & KEPT))

    def feed_forward_backward(dout, x, w13, w13_scale, w2, w2_scale, gate_up, fp8, needs):
        steps, network = kinds.chosen(fp8, is_packed(gate_up)), Network(w13, w13_scale, w2, w2_scale)
        a = None if gate_up.shape[0] > 0 else steps.operand(x)
        da, batch = steps.operand(dout), steps.every_token(x)
        gradients = network_backward(steps, dout, da, x, a, network, batch, gate_up, None, tuple(needs), None)[:3]
        return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)

    return feed_forward, feed_forward_backward


def block_of(
    x: Tensor,
    w13: Tensor,
    w13_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor | None,
    weights: Tensor,
    experts: Tensor,
    shared_w13: Tensor | None,
    shared_w13_scale: Tensor | None,
    shared_w2: Tensor | None,
    shared_w2_scale: Tensor | None,
) -> tuple[Tensor, Network, Tensor, Tensor, Network | None]:
    """The flat arguments that both operations have in common, as `forward` and `backward` take them."""
    shared = None
    if shared_w13 is not None and shared_w2 is not None:
        shared = Network(shared_w13, shared_w13_scale, shared_w2, shared_w2_scale)
    return x, Network(w13, w13_scale, w2, w2_scale), weights, experts, shared


# ---- what implementations share -------------------------------------------------------------------------------------


def gradient_by(
    operand: Callable[[Tensor], Operand],
) -> Callable[[Tensor, Tensor, Batch, Tensor | None], tuple[Operand, Rows, Rows, Tensor | None]]:
    """`Steps.gradient` by the portable kernel, which writes [dG dU] unquantised; `operand` then makes an operand of
    it."""

    def gradient(kept, dhidden, batch, weights):
        dgate_up, hidden, dweights = swiglu_backward(kept, dhidden, batch.source, batch.index, weights)
        return operand(dgate_up), Rows(dgate_up), Rows(hidden), dweights

    return gradient


def plain_weight(weight: Tensor, scale: Tensor | None, transpose: bool) -> Tensor:
    """`Steps.weight` of plain weights: the weight or its transpose, as it is."""
    return weight.mT if transpose else weight


def stacked(weight: Operand) -> Operand:
    """A single weight as a stack of one; a stack as it is."""
    if isinstance(weight, Fp8Tensor):
        return Fp8Tensor(stack(weight.data), stack(weight.scale), weight.block)
    return stack(weight)


def stack(matrix: Tensor) -> Tensor:
    """A single matrix as a stack of one; a stack as it is."""
    return matrix if matrix.dim() == 3 else matrix[None]


def parts(x: Operand) -> tuple[Tensor, Tensor | None]:
    """Data and scale of an operand; the scale of a plain one is None."""
    return (x.data, x.scale) if isinstance(x, Fp8Tensor) else (x, None)
