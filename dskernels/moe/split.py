"""The operations for the backward of `fused_experts` in two halves: the gradients of weights are computed later.

See `dskernels.later` for why, and `dskernels.moe.experts_split` for the implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dskernels.dispatch import Operation
from dskernels.later import Waiting
from dskernels.moe.network import BLOCK
from dskernels.reference import experts as reference

# Positions of the gradients that the second half gives, among those of (x, w13, w2, weights, shared w13, shared w2).
SECOND = (1, 2, 4, 5)


def _inputs_reference(dout, *args):
    kept = _inputs_fake(dout, *args)[2:]  # only for the shapes: the reference's second half does not read them
    return *reference.fused_experts_backward_inputs(dout, *args), *(tensor.zero_() for tensor in kept)


def _inputs_fake(dout, x, w13, w13_scale, w2, w2_scale, weights, experts, shared_w13, *args):
    rows, width = experts.numel(), w13.shape[1]
    shared_width = 0 if shared_w13 is None else shared_w13.shape[0]
    shared_rows = 0 if shared_w13 is None else x.shape[0]
    return (
        x.new_empty(x.shape),
        weights.new_empty(weights.shape),
        x.new_empty(rows, width),
        x.new_empty(rows, width // 2),
        x.new_empty(shared_rows, shared_width),
        x.new_empty(shared_rows, shared_width // 2),
    )


def _weights_fake(dout, *args):
    needs, places = args[-1], (1, 3, 7, 9)
    return tuple(
        args[i].new_empty(args[i].shape) if needed else dout.new_empty(0)
        for i, needed in zip(places, needs, strict=True)
    )


ARGUMENTS = f"Tensor dout, {BLOCK}, Tensor gate_up, Tensor shared_gate_up"

backward_inputs = Operation(
    f"fused_experts_backward_inputs({ARGUMENTS}, bool fp8) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_inputs_reference,
    triton="dskernels.moe.triton_experts:fused_experts_backward_inputs",
    hopper="dskernels.moe.hopper:fused_experts_backward_inputs",
    fake=_inputs_fake,
)
backward_weights = Operation(
    f"fused_experts_backward_weights({ARGUMENTS}, Tensor dgate_up, Tensor hidden, Tensor shared_dgate_up, "
    "Tensor shared_hidden, bool fp8, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.fused_experts_backward_weights,
    triton="dskernels.moe.triton_experts:fused_experts_backward_weights",
    hopper="dskernels.moe.hopper:fused_experts_backward_weights",
    fake=_weights_fake,
)


def split(
    waiting: Waiting, dout: Tensor, block: Sequence[Any], fp8: bool, needs: Sequence[bool], impl: str | None
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x and of the routing weights now, and queue those of the expert weights in `waiting`.

    `block` has the tensors of the operation after `dout`. `needs` says of each of the six gradients whether it is
    needed.
    """
    dx, dweights, *kept = backward_inputs(dout, *block, fp8, impl=impl)
    among = [needs[place] for place in SECOND]

    def rest() -> list[Tensor]:
        gradients = backward_weights(dout, *block, *kept, fp8, among, impl=impl)
        return [gradient for gradient, needed in zip(gradients, among, strict=True) if needed]

    waiting.compute(rest)
    return dx, dweights
