"""What `fused_experts` and `feed_forward` share: checks of their arguments, and making them flat.

Registered operations take tensors and numbers only, so an `Fp8Tensor` is passed as its data and its scale, a plain
weight as itself and None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dskernels.moe.packed import DIFFERENTIATED, KEPT, PACKED
from dskernels.types import Fp8Tensor
from dskernels.validate import HALF_OR_SINGLE, check_bool, check_choice, check_fp8, check_tensor

HOW_KEPT = ("input", "fp8")
# Arguments of the registered operations in torch's schema language; a weight is its data and its scale.
NETWORK = "Tensor x, Tensor w13, Tensor? w13_scale, Tensor w2, Tensor? w2_scale"
BLOCK = (
    f"{NETWORK}, Tensor weights, Tensor experts, "
    "Tensor? shared_w13, Tensor? shared_w13_scale, Tensor? shared_w2, Tensor? shared_w2_scale"
)


def check_network(w13: tuple[str, Any], w2: tuple[str, Any], x: Tensor, fp8: bool, *, stacked: bool) -> None:
    """Check the weights [2I, H] and [H, I], given with their names; `stacked` ones have a first dimension E."""
    ndim = 3 if stacked else 2
    for (name, weight), shape in ((w13, ("E", "2 * I", "H")), (w2, ("E", "H", "I"))):
        if isinstance(weight, Fp8Tensor):
            check_fp8(name, weight, blocks=[(128, 128)], ndim=ndim, like=x)
        else:
            check_tensor(name, weight, dtype=HALF_OR_SINGLE if fp8 else x.dtype, shape=shape[-ndim:], like=x)
    (name, up), (name_down, down) = w13, w2
    (*experts, rows, columns), hidden = up.shape, x.shape[1]
    if rows % 2 or columns != hidden:
        raise ValueError(f"{name}: expected 2 * I rows and H = {hidden} columns like x, got {list(up.shape)}")
    expected = [*experts, hidden, rows // 2]
    if list(down.shape) != expected:
        raise ValueError(
            f"{name_down}: expected shape {expected} for {name} of {list(up.shape)}, got {list(down.shape)}"
        )


def check_options(x: Tensor, quantized: Any, recompute: Any, keep: Any) -> None:
    """Check the options that both operations have, except `fp8`, which decides how weights are checked."""
    if recompute is not None:
        check_bool("recompute", recompute)
    if quantized is not None:
        check_fp8("quantized", quantized, blocks=[(1, 128)], like=x)
        if quantized.shape != x.shape:
            raise ValueError(f"quantized: expected the shape {list(x.shape)} of x, got {list(quantized.shape)}")
    check_choice("keep", keep, HOW_KEPT)


def flat(weight: Tensor | Fp8Tensor) -> tuple[Tensor, Tensor | None]:
    """Data and scale of a weight; the scale of a plain one is None."""
    return (weight.data, weight.scale) if isinstance(weight, Fp8Tensor) else (weight, None)


def flat_options(
    x: Tensor, quantized: Fp8Tensor | None, fp8: bool, recompute: bool | None, keep: str, differentiable: bool
) -> tuple[int, Tensor | None, Tensor | None]:
    """What is kept for the backward, as bits (see `packed`); and data and scale of `quantized`, if it is used."""
    if recompute is None:
        recompute = x.device.type == "cpu"  # the reference runs the forward again in any case
    bits = KEPT if differentiable and not recompute else 0
    bits |= DIFFERENTIATED if differentiable else 0
    bits |= PACKED if differentiable and fp8 and keep == "fp8" else 0
    return (bits, None, None) if quantized is None or not fp8 else (bits, quantized.data, quantized.scale)


def needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a backward may follow: grad mode is on, and one of these requires a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
