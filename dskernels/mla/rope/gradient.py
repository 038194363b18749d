"""The rotation with a gradient, which is the inverse rotation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dskernels.mla.rope.api import apply_rope


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of the last dimension and leave them adjacent; computed in fp32, returned in the dtype of
    ``x``.

    DeepSeek's weights keep the pairs adjacent. Hugging Face's code first moves them into two halves; since it does so
    for queries and keys alike, the scores are the same.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


def rotated_from(x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
    """``x`` ``[T, heads, width]`` with its columns from ``start`` on rotated, as by `dskernels.apply_rope`.

    Differentiable, and two copies fewer than cutting, rotating and joining.
    """
    if torch.compiler.is_compiling():
        turned = rotate(x[..., start:], cos[:, None], sin[:, None])
        return turned if start == 0 else torch.cat((x[..., :start], turned), -1)
    return _Rotated.apply(x, cos, sin, start)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.start = start
        return _Rotated.turned(x, cos, sin, start)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotated.turned(dy, cos, -sin, ctx.start), None, None, None

    @staticmethod
    def turned(x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
        if start == 0:
            return apply_rope(x, cos, sin)
        out = x.clone(memory_format=torch.contiguous_format)
        last = out[..., start:]
        apply_rope(last, cos, sin, out=last)
        return out
