"""The expert block, forward and backward, out of the steps that an implementation brings.

A network is the routed experts, or the shared one, which takes every token. With X the rows of its batch (row r is
token ``source[r] // top_k``), w their routing weights, and dO the rows of the output's gradient in the same order:

    G, U = X W13^T            A = silu(G) * U                out = sum over a token's rows of w * (A W2^T)
    dA' = dO W2               dw = <dA', A>                  not yet weighted
    dG, dU = gradient of the SwiGLU at w * dA'               dX = [dG dU] W13, summed over a token's rows
    dW13 = [dG dU]^T X        dW2 = dO^T (w * A)

So the outputs of the experts, A W2^T, are not needed again (SonicMoE, arXiv 2512.14080): all that is kept is G and U,
or nothing, and they are computed again.

Sorting, the weighted sum and the gradient of the SwiGLU are the portable kernels of this folder, whatever multiplies.
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
    """The rows of a network, sorted by expert; of the shared one, whose rows are the tokens, there is no index.

    Attributes:
        rows: how many there are.
        top_k: choices of a token.
        offsets: int32 ``[E + 1]``, where the rows of each expert begin, and the end; for the shared one, if the
            products of the implementation want it.
        index: int32 ``[T, k]``, the row of each choice, -1 where it was dropped.
        source: int32 ``[rows]``, the choice of each row; -1 after the last expert's, and those rows are never read.
    """

    rows: int
    top_k: int = 1
    offsets: Tensor | None = None
    index: Tensor | None = None
    source: Tensor | None = None


class Rows(NamedTuple):
    """Rows of a batch: those of `data`; with a source, row r is ``data[source[r] // top_k]``."""

    data: Operand
    source: Tensor | None = None


class Network(NamedTuple):
    """Weights of the routed experts, stacked, or of the shared one: data and, where quantised, scale."""

    w13: Tensor
    w13_scale: Tensor | None
    w2: Tensor
    w2_scale: Tensor | None


class Block(NamedTuple):
    """A whole block without a gradient, of which an implementation may run one of a few tokens at once.

    Attributes:
        x: ``[T, H]`` as the products take it.
        dtype: of the output.
        network: the routed experts; the last `n_shared` of them are of every token.
        weights: ``[T, k]``.
        experts: ids ``[T, k]``.
        n_shared: how many shared experts are in the stack.
        shared: the shared network where it is apart from the stack.
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
    """What an implementation of the block does, for operands of one kind.

    Attributes:
        operand: activations as the products take them.
        every_token: the batch of the shared expert, given the tokens.
        rows: tokens as rows of a batch, copied to their experts or to be gathered by the product.
        weight: a weight and its scale, or (True) its transpose, as the products take it.
        product: each row times its expert's weight, in a dtype.
        hidden: silu(gate) * up of ``[rows, 2I]`` as an operand, of the rows that the batch's experts have.
        kept: ``[rows, 2I]`` as the backward keeps it.
        hidden_and_kept: both.
        gradient: given what was kept, the gradient of the hidden rows, the batch and the weights of its rows: the
            gradient of gate and up as an operand, the same and the weighted hidden rows for `wgrad`, and that of the
            weights.
        dispatched: the gradient of the output as an operand, which goes to the experts.
        wgrad: the gradient of a weight, given the rows of both operands and the weight.
        wgrad_requantizes: whether that takes tokens as they are, since it quantises along an expert's rows.
        few: the output ``[T, H]`` of a block of a few tokens, or None if it does not take it.
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
    """Output [T, H], and, if asked to keep them for the backward, gate and up of both networks.

    The last `n_shared` experts are taken by every token; where nothing is kept, a shared expert that follows the routed
    ones in memory is one more of these. `Steps.few`, which rounds elsewhere, is for what nobody differentiates, since
    computing again and keeping are to give the same bits. `quantized` is `x` as the products take it, where that is
    there already.
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
    """Gradients of x, w13, w2, the weights, and both shared weights; empty where one is not needed."""
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
    """The rows of one network, not yet weighted, and what enters its SwiGLU, of no rows unless that is kept."""
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
    """Gradients of x, w13, w2 and the weights, of one network.

    `da` and `a` are `dout` and `x` as the products take them, `a` where `gate_up` was not kept; `residual` is added to
    the gradient of x, which without `added_up` is that of its rows. Rows of the batch are most of the memory: each is
    let go as soon as it is done with.
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
    """Of a weight [E?, N, K] the sum of the rows' outer products, after which its e4m3 copies are done with."""
    gradient = steps.wgrad(x, y, batch, weight)
    if steps.weight is not plain_weight:
        done_with(weight)
    return gradient


def gate_up_again(steps: Steps, a: Operand, network: Network, batch: Batch, dtype: torch.dtype) -> Tensor:
    """What enters the SwiGLU, as it would have been kept."""
    return steps.kept(_up(steps, a, network, batch, dtype))


def gradient_of_hidden(steps: Steps, dy: Rows, network: Network, batch: Batch, dtype: torch.dtype) -> Tensor:
    """dA', of what comes out of the SwiGLU."""
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
    """dX: of the rows, or, `added_up`, of the tokens that they are, and of `residual` besides."""
    dx = steps.product(Rows(dgate_up), steps.weight(network.w13, network.w13_scale, True), batch, dtype)
    return weighted_sum(dx, batch.index, None, residual) if added_up and batch.index is not None else dx


def rows_for_wgrad(steps: Steps, tokens: Tensor, batch: Batch) -> Rows:
    """Tokens as `Steps.wgrad` takes their rows."""
    return Rows(tokens, batch.source) if steps.wgrad_requantizes else steps.rows(tokens, batch)


def _one_stack(steps: Steps, routed: Network, shared: Network) -> Network | None:
    """The weights of both as one stack, where they already are that in memory, as the products take them."""
    quantized_inside = routed.w13_scale is None and steps.weight is not plain_weight
    if routed.w13.shape[0] >= MAX_EXPERTS or quantized_inside:
        return None
    stacks = [_with_next(stack, matrix) for stack, matrix in zip(routed, shared, strict=True)]
    if any(both is None and stack is not None for both, stack in zip(stacks, routed, strict=True)):
        return None
    w13, w13_scale, w2, w2_scale = stacks
    return None if w13 is None or w2 is None else Network(w13, w13_scale, w2, w2_scale)


def _with_next(stack: Tensor | None, matrix: Tensor | None) -> Tensor | None:
    """`stack` [E, N, K] with `matrix` [N, K] as its last, if that is where it lies, or None."""
    if stack is None or matrix is None or stack.shape[0] == 0 or stack.dtype != matrix.dtype:
        return None
    if stack.shape[1:] != matrix.shape or stack.stride()[1:] != matrix.stride():
        return None
    follows = matrix.data_ptr() == stack.data_ptr() + stack.shape[0] * stack.stride(0) * stack.element_size()
    if not follows or stack.untyped_storage().data_ptr() != matrix.untyped_storage().data_ptr():
        return None
    return stack.as_strided((stack.shape[0] + 1, *stack.shape[1:]), stack.stride(), stack.storage_offset())


def routed_batch(experts: Tensor, network: Network, first: int = 0) -> tuple[Batch, Tensor]:
    """The batch of the routed experts, whose ids begin at `first`, and its index."""
    offsets, index, source = sort(experts, network.w13.shape[0], first)
    return Batch(source.shape[0], experts.shape[1], offsets, index, source), index


def _up(steps: Steps, a: Operand, network: Network, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Gate and up, [rows, 2I]."""
    return steps.product(steps.rows(a, batch), steps.weight(network.w13, network.w13_scale, False), batch, dtype)


# ---- the registered operations --------------------------------------------------------------------------------------


class Kinds(NamedTuple):
    """Steps for plain operands, for those in e4m3, and for those that also keep what enters the SwiGLU in e4m3."""

    plain: Steps
    quantized: Steps
    packing: Steps

    def chosen(self, fp8: bool, packed: bool) -> Steps:
        """Of these."""
        return self.packing if fp8 and packed else self.quantized if fp8 else self.plain


def operations(kinds: Kinds) -> tuple[Callable, Callable]:
    """`fused_experts` and its backward on the operations' flat arguments."""

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
    """`feed_forward` and its backward, likewise: one network that every token takes."""

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
    """What forward and backward take of the arguments that both operations have."""
    shared = None
    if shared_w13 is not None and shared_w2 is not None:
        shared = Network(shared_w13, shared_w13_scale, shared_w2, shared_w2_scale)
    return x, Network(w13, w13_scale, w2, w2_scale), weights, experts, shared


# ---- what implementations share -------------------------------------------------------------------------------------


def gradient_by(
    operand: Callable[[Tensor], Operand],
) -> Callable[[Tensor, Tensor, Batch, Tensor | None], tuple[Operand, Rows, Rows, Tensor | None]]:
    """`Steps.gradient` by the portable kernel, its results written out and made operands one by one."""

    def gradient(kept, dhidden, batch, weights):
        dgate_up, hidden, dweights = swiglu_backward(kept, dhidden, batch.source, batch.index, weights)
        return operand(dgate_up), Rows(dgate_up), Rows(hidden), dweights

    return gradient


def plain_weight(weight: Tensor, scale: Tensor | None, transpose: bool) -> Tensor:
    """A weight, or its transpose, as it is."""
    return weight.mT if transpose else weight


def stacked(weight: Operand) -> Operand:
    """A weight as a stack of one; a stack as it is."""
    if isinstance(weight, Fp8Tensor):
        return Fp8Tensor(stack(weight.data), stack(weight.scale), weight.block)
    return stack(weight)


def stack(matrix: Tensor) -> Tensor:
    """A matrix as a stack of one; a stack as it is."""
    return matrix if matrix.dim() == 3 else matrix[None]


def parts(x: Operand) -> tuple[Tensor, Tensor | None]:
    """Data and scale."""
    return (x.data, x.scale) if isinstance(x, Fp8Tensor) else (x, None)
