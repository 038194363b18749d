"""The backward of the expert block in two halves: gradients of the tokens first, those of the weights later.

Schedules of pipeline parallelism use this (`dskernels.later`): other ranks wait only for the gradients of tokens. The
first half also returns the operands of the second: dG and dU, and w * A, in the notation of `dskernels.moe.experts`.
Both halves together launch the products of the whole backward, each of them once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dskernels.moe.experts import (
    Batch,
    Kinds,
    Network,
    Operand,
    Rows,
    Steps,
    block_of,
    gate_up_again,
    gradient_of_hidden,
    gradient_of_tokens,
    gradient_of_weight,
    routed_batch,
    rows_for_wgrad,
)
from dskernels.moe.packed import is_packed
from dskernels.moe.triton_swiglu import swiglu_backward


def backward_inputs(
    steps: Steps,
    dout: Tensor,
    x: Tensor,
    routed: Network,
    weights: Tensor,
    experts: Tensor,
    shared: Network | None,
    gate_up: Tensor,
    shared_gate_up: Tensor,
) -> tuple[Tensor, ...]:
    """First half: gradients of x and of the routing weights; then [dG dU] and w * A of the routed experts, and of the
    shared one (empty without it)."""
    da = steps.dispatched(dout)
    a = None if gate_up.shape[0] > 0 else steps.operand(x)
    dx, of_shared = None, [x.new_empty(0), x.new_empty(0)]
    if shared is not None:
        dx, _, *of_shared = inputs_of_network(steps, da, x, a, shared, steps.every_token(x), shared_gate_up, None, None)
    batch, _ = routed_batch(experts, routed)
    dx, dweights, *of_routed = inputs_of_network(steps, da, x, a, routed, batch, gate_up, weights, dx)
    return dx, dweights, *of_routed, *of_shared


def inputs_of_network(
    steps: Steps,
    da: Operand,
    x: Tensor,
    a: Operand | None,
    network: Network,
    batch: Batch,
    gate_up: Tensor,
    weights: Tensor | None,
    residual: Tensor | None,
    added_up: bool = True,
) -> tuple[Any, ...]:
    """First half for one network: the gradients of x and of the routing weights, [dG dU], and w * A.

    Arguments are those of `experts.network_backward`.
    """
    if a is not None:
        gate_up = gate_up_again(steps, a, network, batch, x.dtype)
    dhidden = gradient_of_hidden(steps, steps.rows(da, batch), network, batch, x.dtype)
    weights = None if weights is None else weights.contiguous()
    dgate_up, hidden, dweights = swiglu_backward(gate_up, dhidden, batch.source, batch.index, weights)
    del gate_up, dhidden
    dx = gradient_of_tokens(steps, steps.operand(dgate_up), network, batch, x.dtype, residual, added_up)
    return dx, dweights, dgate_up, hidden


def backward_weights(
    steps: Steps,
    dout: Tensor,
    x: Tensor,
    routed: Network,
    experts: Tensor,
    shared: Network | None,
    dgate_up: Tensor,
    hidden: Tensor,
    shared_dgate_up: Tensor,
    shared_hidden: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Second half: gradients of w13 and w2, and of both shared weights; an empty tensor for each that is not needed.

    `dgate_up`, `hidden` and their shared counterparts are [dG dU] and w * A as the first half returned them.
    """
    gradients = [x.new_empty(0)] * 4
    if any(needs[:2]):
        batch, _ = routed_batch(experts, routed)
        gradients[:2] = weights_of_network(steps, dout, x, routed, batch, dgate_up, hidden, needs[:2])
    if shared is not None and any(needs[2:]):
        batch = steps.every_token(x)
        gradients[2:] = weights_of_network(steps, dout, x, shared, batch, shared_dgate_up, shared_hidden, needs[2:])
    return tuple(gradients)


def weights_of_network(
    steps: Steps,
    dout: Tensor,
    x: Tensor,
    network: Network,
    batch: Batch,
    dgate_up: Tensor,
    hidden: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """Second half for one network: gradients of w13 and w2; an empty tensor for each that is not needed."""
    dw13 = dw2 = x.new_empty(0)
    if needs[1]:
        dw2 = gradient_of_weight(steps, rows_for_wgrad(steps, dout, batch), Rows(hidden), batch, network.w2)
    if needs[0]:
        dw13 = gradient_of_weight(steps, Rows(dgate_up), rows_for_wgrad(steps, x, batch), batch, network.w13)
    return [dw13, dw2]


def split_operations(kinds: Kinds) -> tuple[Callable, Callable]:
    """Both halves of the backward, on the operations' flat arguments."""

    def inputs(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *block, gate_up, shared_gate_up, fp8 = args
        steps = kinds.chosen(fp8, is_packed(gate_up))
        return backward_inputs(steps, dout, *block_of(*block), gate_up, shared_gate_up)

    def of_weights(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *block, _, _, dgate_up, hidden, shared_dgate_up, shared_hidden, fp8, needs = args
        x, routed, _, experts, shared = block_of(*block)
        kept = dgate_up, hidden, shared_dgate_up, shared_hidden
        return backward_weights(kinds.chosen(fp8, False), dout, x, routed, experts, shared, *kept, needs)

    return inputs, of_weights
