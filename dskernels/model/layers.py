"""The plain layers a block is made of: RMSNorm, a linear layer in bf16 or fp8, the gated feed-forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dskernels as ds


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``[..., size]``."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Linear(nn.Module):
    """``x @ weight.T`` in the dtype of the weight or, with ``fp8``, in e4m3 (all three products of training)."""

    def __init__(self, inputs: int, outputs: int, fp8: bool) -> None:
        super().__init__()
        self.fp8 = fp8
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` to ``[..., outputs]``."""
        return ds.fp8_linear(x, self.weight) if self.fp8 else F.linear(x, self.weight)


class FeedForward(nn.Module):
    """``w2(silu(gate) * up)`` with gate and up in one matrix ``w13``: the dense blocks and the shared experts."""

    def __init__(self, hidden: int, inner: int, fp8: bool) -> None:
        super().__init__()
        self.w13 = Linear(hidden, 2 * inner, fp8)
        self.w2 = Linear(inner, hidden, fp8)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, hidden]`` to ``[T, hidden]``."""
        gate, up = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate) * up)
