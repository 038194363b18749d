"""The public operation that applies rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor

from dskernels.dispatch import Operation
from dskernels.reference import mla as reference
from dskernels.repeated import repeated
from dskernels.validate import HALF_OR_SINGLE, check_tensor, check_written

FLOATS = (*HALF_OR_SINGLE, torch.float64)


@repeated
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor | None = None, impl: str | None = None) -> Tensor:
    """Rotate the adjacent pairs of the last dimension by their token's angles, and leave them adjacent.

    (x[t, h, 2i], x[t, h, 2i+1]) -> (x[2i] cos[t, i] - x[2i+1] sin[t, i], x[2i] sin[t, i] + x[2i+1] cos[t, i]), computed
    in fp32 and rounded once.

    Args:
        x: bf16, fp16 or fp32 ``[T, H, rope]`` (64 in DeepSeek-V3), tokens and heads may be strided: the last part of
            queries, ``q[..., nope:]``. (fp64 runs on the reference.)
        cos: fp32 ``[T, rope / 2]``, of each token's own position, last dimension contiguous.
        sin: likewise.
        out: like `x`, to write to; `x` itself rotates it in place.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        ``[T, H, rope]`` in x's dtype; `out` itself if it is given.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, strides or devices do not fit.

    If `out` overlaps `x` without being `x`, the result is unspecified. Zero tokens or heads launch nothing. Not
    differentiable.
    Source: RoFormer (arXiv 2104.09864), eq. 34.
    """
    check_tensor("x", x, dtype=FLOATS, shape=("T", "H", "rope"))
    tokens, _, rope = x.shape
    if rope == 0 or rope % 2:
        raise ValueError(f"x: expected a positive even number of columns, got {rope}")
    for name, angles in (("cos", cos), ("sin", sin)):
        check_tensor(name, angles, dtype=torch.float32, shape=(tokens, rope // 2), like=x)
    if out is None:
        out = x.new_empty(x.shape)
    else:
        check_tensor("out", out, dtype=x.dtype, shape=tuple(x.shape), like=x)
        check_written("out", out)
    if out is x:
        _apply_rope_in_place(x, cos, sin, impl=impl)
    else:
        _apply_rope(x, cos, sin, out, impl=impl)
    return out


# ---- registration: one operation may not be given the same tensor as argument and result -----------------------------


@torch.no_grad()
def _reference(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    wide = torch.promote_types(x.dtype, torch.float32)
    out.copy_(reference.apply_rope(x.to(wide), cos[:, None].to(wide), sin[:, None].to(wide)))


_apply_rope = Operation(
    "apply_rope(Tensor x, Tensor cos, Tensor sin, Tensor(a!) out) -> ()",
    reference=_reference,
    triton="dskernels.mla.rope.triton:apply_rope",
)
_apply_rope_in_place = Operation(
    "apply_rope_(Tensor(a!) x, Tensor cos, Tensor sin) -> ()",
    reference=lambda x, cos, sin: _reference(x, cos, sin, x),
    triton="dskernels.mla.rope.triton:apply_rope_in_place",
)
