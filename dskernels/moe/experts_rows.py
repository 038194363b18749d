"""The expert block without the final sum over each token's rows, forward and backward, see `dskernels.moe.rows`.

Its steps and products are those of `dskernels.moe.experts`. Only the last kernel of each direction is left out: the
forward returns one row for each choice instead of one for each token, and so does the gradient of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dskernels.moe.experts import Kinds, Network, Steps, network_backward, network_forward, routed_batch
from dskernels.moe.experts_split import inputs_of_network, weights_of_network
from dskernels.moe.packed import KEPT, PACKED, is_packed
from dskernels.types import Fp8Tensor


def rows_operations(kinds: Kinds) -> tuple[Callable, Callable, Callable, Callable]:
    """Forward, backward, and both halves of the backward (`experts_split`), on the operations' flat arguments."""

    def expert_rows(x, w13, w13_scale, w2, w2_scale, experts, first, fp8, keep, data, scale):
        steps, network = kinds.chosen(fp8, bool(keep & PACKED)), Network(w13, w13_scale, w2, w2_scale)
        a = steps.operand(x) if data is None or scale is None else Fp8Tensor(data, scale)
        batch, index = routed_batch(experts, network, first)
        rows, gate_up = network_forward(steps, a, network, batch, x.dtype, bool(keep & KEPT))
        return rows, index, gate_up

    def expert_rows_backward(dout, x, w13, w13_scale, w2, w2_scale, weights, experts, first, gate_up, fp8, needs):
        steps, network = kinds.chosen(fp8, is_packed(gate_up)), Network(w13, w13_scale, w2, w2_scale)
        batch, _ = routed_batch(experts, network, first)
        a, weights = _operand_again(steps, x, gate_up), weights.contiguous()
        dx, dw13, dw2, dweights = network_backward(
            steps, dout, steps.dispatched(dout), x, a, network, batch, gate_up, weights, tuple(needs[:3]), None, False
        )
        return _or_empty(x, dx, dw13, dw2, dweights)

    def inputs(dout, x, w13, w13_scale, w2, w2_scale, weights, experts, first, gate_up, fp8):
        steps, network = kinds.chosen(fp8, is_packed(gate_up)), Network(w13, w13_scale, w2, w2_scale)
        batch, _ = routed_batch(experts, network, first)
        a, da = _operand_again(steps, x, gate_up), steps.dispatched(dout)
        return inputs_of_network(steps, da, x, a, network, batch, gate_up, weights, None, False)

    def of_weights(
        dout, x, w13, w13_scale, w2, w2_scale, weights, experts, first, gate_up, dgate_up, hidden, fp8, needs
    ):
        steps, network = kinds.chosen(fp8, False), Network(w13, w13_scale, w2, w2_scale)
        batch, _ = routed_batch(experts, network, first)
        return tuple(weights_of_network(steps, dout, x, network, batch, dgate_up, hidden, needs))

    return expert_rows, expert_rows_backward, inputs, of_weights


def _operand_again(steps: Steps, x: Tensor, gate_up: Tensor) -> Any:
    """`x` as the products take it, if `gate_up` was not kept and has to be computed again; else None."""
    return None if gate_up.shape[0] > 0 else steps.operand(x)


def _or_empty(like: Tensor, *gradients: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)
