"""The expert block in the form of its registered operations: flat arguments, what is saved for the backward, gradients.

The meaning of the block is in `moe`, and here autograd differentiates it. Names and arguments are those of
dskernels/moe/triton_experts.py, of which this is the reference: a weight comes as data and scale (None if it is not
quantised), and `keep` consists of the two bits in dskernels/moe/packed.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dskernels.dispatch import differentiating
from dskernels.moe.packed import KEPT, PACKED, empty_kept, is_packed, pack
from dskernels.reference import moe
from dskernels.reference.fp8 import quantize
from dskernels.reference.grouped_gemm import grouped_gemm
from dskernels.types import Fp8Tensor, Routing


def fused_experts(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The output [T, H], and gate and up of the routed rows and of the shared expert; without rows if they are not
    kept."""
    *block, fp8, keep, data, scale, n_shared = args
    if n_shared:
        block[5:7] = with_shared(block[5], block[6], block[1].shape[0], n_shared)
    x, w13, w13_scale, _, _, _, experts, shared_w13, shared_scale, *_ = block
    out = _block(_given(x, data, scale), *block[1:], fp8=fp8).to(x.dtype)
    packed = fp8 and bool(keep & PACKED)
    gate_up = empty_kept(x, 0, w13.shape[1], packed)
    shared_gate_up = x.new_empty(0, 0) if shared_w13 is None else empty_kept(x, 0, shared_w13.shape[0], packed)
    if keep & KEPT:
        permuted = moe.permute(x, experts, w13.shape[0])
        gate_up = _gate_up(permuted.x, w13, w13_scale, permuted.offsets, fp8, packed)
        if shared_w13 is not None:
            shared_gate_up = _gate_up_of_all(x, shared_w13, shared_scale, fp8, packed)
    return out, gate_up, shared_gate_up


def fused_experts_backward(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of x, w13, w2, the routing weights and both shared weights; empty for those that are not needed."""
    *block, gate_up, _, fp8, needs = args
    forward = functools.partial(_block, fp8=fp8, packed=is_packed(gate_up))
    return _gradients(forward, block, (0, 1, 3, 5, 7, 9), needs, dout)


def fused_experts_backward_inputs(dout: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The part of `fused_experts_backward` for x and the routing weights, and nothing for the other part to use."""
    needs = [True, False, False, True, False, False]
    dx, _, _, dweights, _, _ = fused_experts_backward(dout, *args, needs)
    return dx, dweights


def fused_experts_backward_weights(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The part of `fused_experts_backward` for w13, w2 and both shared weights; it uses nothing from the other part."""
    *block, _, _, _, _, fp8, needs = args
    w13, w2, shared_w13, shared_w2 = needs
    among = [False, w13, w2, False, shared_w13, shared_w2]
    _, dw13, dw2, _, *shared = fused_experts_backward(dout, *block, fp8, among)
    return dw13, dw2, *shared


def feed_forward(x, w13, w13_scale, w2, w2_scale, fp8, keep, data, scale) -> tuple[Tensor, Tensor]:
    """The output [T, H], and gate and up, without rows if they are not kept."""
    out = _network(_given(x, data, scale), w13, w13_scale, w2, w2_scale, fp8=fp8).to(x.dtype)
    packed = fp8 and bool(keep & PACKED)
    if keep & KEPT:
        return out, _gate_up_of_all(x, w13, w13_scale, fp8, packed)
    return out, empty_kept(x, 0, w13.shape[0], packed)


def feed_forward_backward(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of x, w13 and w2; empty for those that are not needed."""
    *network, gate_up, fp8, needs = args
    forward = functools.partial(_network, fp8=fp8, packed=is_packed(gate_up))
    return _gradients(forward, network, (0, 1, 3), needs, dout)


def with_shared(weights: Tensor, experts: Tensor, n_experts: int, n_shared: int) -> tuple[Tensor, Tensor]:
    """Each token's choices, with the last experts (the shared ones) appended, with weight 1."""
    first = n_experts - n_shared
    shared = torch.arange(first, n_experts, dtype=experts.dtype, device=experts.device).expand(experts.shape[0], -1)
    chosen = torch.where(experts < first, experts, -1)
    return torch.cat([weights, weights.new_ones(shared.shape)], 1), torch.cat([chosen, shared], 1)


def _block(x, w13, w13_scale, w2, w2_scale, weights, experts, *shared, fp8, packed=False) -> Tensor:
    shared_w13, shared_w13_scale, shared_w2, shared_w2_scale = shared
    network = None
    if shared_w13 is not None:
        network = _weight(shared_w13, shared_w13_scale), _weight(shared_w2, shared_w2_scale)
    routing = Routing(weights, experts, experts, experts)  # the last two fields are not used
    keep = "fp8" if packed else "input"
    w13, w2 = _weight(w13, w13_scale), _weight(w2, w2_scale)
    return moe.fused_experts(x, w13, w2, routing, shared=network, fp8=fp8, keep=keep)


def _network(x, w13, w13_scale, w2, w2_scale, *, fp8, packed=False) -> Tensor:
    keep = "fp8" if packed else "input"
    return moe.feed_forward(x, _weight(w13, w13_scale), _weight(w2, w2_scale), fp8=fp8, keep=keep)


def _weight(data: Tensor, scale: Tensor | None) -> Tensor | Fp8Tensor:
    return data if scale is None else Fp8Tensor(data, scale, (128, 128))


def _given(x: Tensor, data: Tensor | None, scale: Tensor | None) -> Tensor:
    """The tokens. If they come quantised, their values: quantising these again gives the same bytes."""
    return x if data is None or scale is None else Fp8Tensor(data, scale).dequantize(torch.float32)


def _gate_up(a: Tensor, w13: Tensor, scale: Tensor | None, offsets: Tensor, fp8: bool, packed: bool) -> Tensor:
    """Gate and up of each row, in the form in which they are kept."""
    out = a.new_empty(a.shape[0], w13.shape[1])
    if not fp8:
        return grouped_gemm(a, w13, offsets, out=out)
    weight = quantize(w13, (128, 128)) if scale is None else _weight(w13, scale)
    grouped_gemm(quantize(a), weight, offsets, out=out)
    return pack(quantize(out)) if packed else out


def _gate_up_of_all(x: Tensor, w13: Tensor, scale: Tensor | None, fp8: bool, packed: bool) -> Tensor:
    """The same for a network that every token goes through."""
    every = torch.tensor([0, x.shape[0]])
    return _gate_up(x, w13[None], None if scale is None else scale[None], every, fp8, packed)


def _gradients(
    forward: Callable[..., Tensor], args: Sequence[Any], places: Sequence[int], needs: Sequence[bool], dout: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of the arguments in these places; empty for those that are not needed."""
    leaves = list(args)
    needed = [place for place, need in zip(places, needs, strict=True) if need]
    for place in needed:
        leaves[place] = leaves[place].detach().requires_grad_()
    with differentiating():
        out = forward(*leaves)
    gradients = iter(torch.autograd.grad(out, [leaves[place] for place in needed], dout))
    return tuple(next(gradients) if need else dout.new_empty(0) for need in needs)
