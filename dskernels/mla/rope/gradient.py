"""The rotation with a gradient, which is the rotation the other way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dskernels.mla.rope.api import apply_rope


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates adjacent pairs of the last dimension and leaves them adjacent, in fp32, returned in the dtype of ``x``.

    DeepSeek's weights lay the pairs next to each other. Hugging Face's code moves them into halves first; queries
    and keys move alike, so that the scores are the same.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


def rotated_from(x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
    """``x`` ``[T, heads, width]`` with its columns from ``start`` on rotated, as `dskernels.apply_rope` does it.

    Differentiable; two copies less than to cut, rotate and join.
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
