"""The public gated feed-forward network: the network of a dense block, or a shared expert by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dskernels.dispatch import Operation
from dskernels.later import waiting_for
from dskernels.moe.network import NETWORK, check_network, check_options, flat, flat_options, needs_gradient
from dskernels.moe.packed import KEPT, PACKED, empty_kept
from dskernels.reference import experts as reference
from dskernels.repeated import repeated
from dskernels.types import Fp8Tensor
from dskernels.validate import HALF_OR_SINGLE, check_bool, check_tensor


@repeated
def feed_forward(
    x: Tensor,
    w13: Tensor | Fp8Tensor,
    w2: Tensor | Fp8Tensor,
    *,
    quantized: Fp8Tensor | None = None,
    fp8: bool = False,
    recompute: bool | None = None,
    keep: str = "input",
    impl: str | None = None,
) -> Tensor:
    """Run one gated feed-forward network on all tokens: ``w2 @ (silu(gate) * up)``, gate and up being the halves of
    ``w13 @ x``.

    It is the shared expert of :func:`fused_experts` alone, with the same products, roundings and gradients.

    Args:
        x: bf16, fp16 or fp32 ``[T, H]``, last dimension contiguous.
        w13: ``[2 * I, H]``, the I rows of the gate first, then those of up; in the dtype of `x`, or with `fp8` in any
            of bf16, fp16 and fp32. Or an `Fp8Tensor` in 128x128 blocks.
        w2: ``[H, I]``, likewise.
        quantized: `x` already quantised, ``[T, H]`` in 1x128 tiles, see :func:`fused_experts`.
        fp8: quantise, inside, whatever is not quantised yet.
        recompute: keep nothing but the arguments for the backward, see :func:`fused_experts`.
        keep: the format in which the input of the SwiGLU is kept, see :func:`fused_experts`.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        ``[T, H]`` in x's dtype.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, tiles, strides or devices do not fit.

    Differentiable in `x` and in weights that are not `Fp8Tensor`s. T = 0 gives an empty result.
    Source: Shazeer, arXiv 2002.05202; DeepSeek-V3 report, figure 6.
    """
    check_tensor("x", x, dtype=HALF_OR_SINGLE, shape=("T", "H"))
    check_bool("fp8", fp8)
    fp8 = fp8 or isinstance(w13, Fp8Tensor) or isinstance(w2, Fp8Tensor)
    check_network(("w13", w13), ("w2", w2), x, fp8, stacked=False)
    check_options(x, quantized, recompute, keep)
    network = (x, *flat(w13), *flat(w2))
    options = flat_options(x, quantized, fp8, recompute, keep, needs_gradient(network))
    return _feed_forward(*network, fp8, *options, impl=impl)[0]


# ---- registration: flat arguments in, flat tensors out --------------------------------------------------------------

DIFFERENTIABLE = (0, 1, 3)  # positions of x and both weights among the operation's arguments
SCALES = {1: 2, 3: 4}  # the position of each weight, and of its scale; a weight with a scale has no gradient


def _backward_fake(dout, *args):
    *network, _, _, needs = args
    return tuple(
        network[i].new_empty(network[i].shape) if needed else dout.new_empty(0)
        for i, needed in zip(DIFFERENTIABLE, needs, strict=True)
    )


_feed_forward = Operation(
    f"feed_forward({NETWORK}, bool fp8, int keep, Tensor? quantized, Tensor? quantized_scale) -> (Tensor, Tensor)",
    reference=reference.feed_forward,
    triton="dskernels.moe.triton_experts:feed_forward",
    hopper="dskernels.moe.hopper:feed_forward",
    fake=lambda x, w13, s13, w2, s2, fp8, keep, data, scale: (
        x.new_empty(x.shape),
        empty_kept(x, x.shape[0] if keep & KEPT else 0, w13.shape[0], fp8 and bool(keep & PACKED)),
    ),
)
_feed_forward_backward = Operation(
    f"feed_forward_backward(Tensor dout, {NETWORK}, Tensor gate_up, bool fp8, bool[] needs)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.feed_forward_backward,
    triton="dskernels.moe.triton_experts:feed_forward_backward",
    hopper="dskernels.moe.hopper:feed_forward_backward",
    fake=_backward_fake,
)


def _save(ctx: Any, args: tuple, output: tuple) -> None:
    *network, ctx.fp8, _, _, _ = args
    _, gate_up = output
    trained = [network[i] for i, scale in SCALES.items() if network[scale] is None]
    ctx.waiting = waiting_for(*trained) if len(trained) == len(SCALES) else None
    ctx.mark_non_differentiable(gate_up)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*network, gate_up)


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] and (i not in SCALES or saved[SCALES[i]] is None) for i in DIFFERENTIABLE]
    result: list[Tensor | None] = [None] * _feed_forward.arity
    if dout is None or not any(needs):
        return tuple(result)
    dout = dout.contiguous()
    if ctx.waiting is not None:  # the gradients of the weights are collected, and computed when their queue is run
        later = [False, True, True]
        ctx.waiting.compute(lambda: _feed_forward_backward(dout, *saved, ctx.fp8, later, impl=ctx.impl)[1:])
        needs = [needs[0], False, False]
    gradients = _feed_forward_backward(dout, *saved, ctx.fp8, needs, impl=ctx.impl)
    for i, needed, gradient in zip(DIFFERENTIABLE, needs, gradients, strict=True):
        result[i] = gradient if needed else None
    return tuple(result)


_feed_forward.register_autograd(_backward, _save)
