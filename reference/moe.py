"""The expert block of a mixture of experts: permute to experts, gated feed-forward networks, weighted sum to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dskernels.reference.fp8 import quantize
from dskernels.reference.gemm import fp8_linear
from dskernels.types import Fp8Tensor, Permuted, Routing


def permute(x: Tensor, experts: Tensor, n_experts: int) -> Permuted:
    """Copy each token's row once for every expert that it chose, sorted by expert; inside an expert, tokens keep their
    order.

    ``permuted.x[index[t, j]] = x[t]``, a stable sort by ``experts[t, j]``. Ids outside ``[0, n_experts)`` are dropped.
    """
    T, k = experts.shape
    valid = (experts >= 0) & (experts < n_experts)
    group = torch.where(valid, experts, n_experts).flatten()
    order = group.argsort(stable=True)
    row = torch.empty_like(order)
    row[order] = torch.arange(T * k, device=order.device)

    load = (group[:, None] == torch.arange(n_experts, device=group.device)).sum(0)
    offsets = F.pad(load.cumsum(0), (1, 0)).int()
    index = torch.where(valid, row.view(T, k), -1).int()
    has_expert = (group[order] < n_experts)[:, None]
    return Permuted(torch.where(has_expert, x[order // k], 0), offsets, index)


def combine(y: Tensor, permuted: Permuted, weights: Tensor) -> Tensor:
    """Sum each token's expert outputs, ``out[t] = sum_j weights[t, j] * y[index[t, j]]``, in fp32, in the order of j.

    The outer sum of DeepSeek-V3 report eq. 12. Dropped choices (index -1) add nothing.
    """
    valid = (permuted.index >= 0) & (permuted.index < y.shape[0])
    rows = torch.where(valid, permuted.index, 0)
    out = _wide(y).new_zeros(permuted.index.shape[0], y.shape[1])
    for j in range(permuted.index.shape[1]):
        term = weights[:, j, None] * _wide(y)[rows[:, j]]
        out = out + torch.where(valid[:, j, None], term, 0)
    return out.to(y.dtype)


def fused_experts(
    x: Tensor,
    w13: Tensor | Fp8Tensor,
    w2: Tensor | Fp8Tensor,
    routing: Routing,
    *,
    shared: tuple[Tensor | Fp8Tensor, Tensor | Fp8Tensor] | None = None,
    fp8: bool = False,
    recompute: bool | None = None,
    keep: str = "input",
) -> Tensor:
    """Run the whole expert block, ``out[t] = shared(x[t]) + sum_j weights[t, j] * expert[experts[t, j]](x[t])``.

    DeepSeek-V3 report eq. 12 without its residual; an expert is ``w2 @ (silu(gate) * up)`` with ``gate, up = w13 @ x``
    (Shazeer, arXiv 2002.05202). With fp8 weights, or ``fp8=True``, each product of an expert is that of `fp8_linear`.
    `recompute` trades time for memory in other implementations and changes nothing here.
    """
    x_TH = _wide(x)
    fp8 = fp8 or any(isinstance(weight, Fp8Tensor) for weight in (w13, w2, *(shared or ())))
    out = torch.zeros_like(x_TH) if shared is None else feed_forward(x_TH, *shared, fp8=fp8, dispatched=True, keep=keep)
    for e, (w13_IH, w2_HI) in enumerate(zip(_matrices(w13), _matrices(w2), strict=True)):
        token, choice = torch.where(routing.experts == e)
        weights = routing.weights[token, choice]
        y_RH = feed_forward(x_TH[token], w13_IH, w2_HI, weights, fp8=fp8, dispatched=True, keep=keep)
        out = out.index_add(0, token, y_RH)
    return out.to(x.dtype)


def feed_forward(
    x: Tensor,
    w13: Tensor | Fp8Tensor,
    w2: Tensor | Fp8Tensor,
    weights: Tensor | None = None,
    *,
    fp8: bool = False,
    dispatched: bool = False,
    keep: str = "input",
) -> Tensor:
    """One gated network: ``w2 @ (silu(gate) * up)`` with ``gate, up = w13 @ x`` (Shazeer, arXiv 2002.05202).

    With fp8 weights, or ``fp8=True``, each product is that of `fp8_linear`, and with ``keep="fp8"`` the input of the
    SwiGLU is saved for the backward in e4m3 (report section 3.3.3). Rows are multiplied by `weights` [T], and their
    gradient only after it has been quantised; with `dispatched`, the scales of that are powers of two.
    """
    w13, w2 = _wide(w13), _wide(w2)
    if fp8 or isinstance(w13, Fp8Tensor) or isinstance(w2, Fp8Tensor):
        master, scale = (w2.data, w2.scale) if isinstance(w2, Fp8Tensor) else (w2, None)
        return _GatedLinear.apply(fp8_linear(_wide(x), w13), master, scale, weights, dispatched, keep).to(x.dtype)
    y = F.linear(_swiglu(F.linear(_wide(x), w13)), w2)
    return (y if weights is None else weights[:, None] * y).to(x.dtype)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class _GatedLinear(torch.autograd.Function):
    """``silu(gate) * up``, the product after it, and weights; the backward uses gate and up in the form in which
    they are kept."""

    @staticmethod
    def forward(ctx, gate_up, w2, scale, weights, dispatched, keep):
        ctx.save_for_backward(gate_up, w2, scale, weights)
        ctx.dispatched, ctx.keep = dispatched, keep
        y = fp8_linear(_swiglu(gate_up), w2 if scale is None else Fp8Tensor(w2, scale, (128, 128)))
        return y if weights is None else weights[:, None] * y

    @staticmethod
    def backward(ctx, dy):
        gate_up, w2, scale, weights = ctx.saved_tensors
        kept = (quantize(gate_up).dequantize() if ctx.keep == "fp8" else gate_up).detach().requires_grad_()
        w2 = w2.detach().requires_grad_(scale is None)
        weights = None if weights is None else weights.detach().requires_grad_()
        with torch.enable_grad():
            hidden = _swiglu(kept) if weights is None else weights[:, None] * _swiglu(kept)
            weight = w2 if scale is None else Fp8Tensor(w2, scale, (128, 128))
            y = fp8_linear(hidden, weight, dy_format="ue8m0" if ctx.dispatched else "fp32")
        inputs = (kept, w2, None, weights, None, None)
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        gradients = iter(torch.autograd.grad(y, wanted, dy))
        return tuple(next(gradients) if x is not None and x.requires_grad else None for x in inputs)


def _matrices(stack: Tensor | Fp8Tensor) -> Sequence[Tensor | Fp8Tensor]:
    """The matrix of each expert, split by one operation, so that autograd also joins their gradients in one."""
    if isinstance(stack, Fp8Tensor):
        return [Fp8Tensor(data, scale, stack.block) for data, scale in zip(stack.data, stack.scale, strict=True)]
    return stack.unbind()


def _wide(x: Any) -> Any:
    """The values in fp32; fp64 and fp8 do not change."""
    return x if isinstance(x, Fp8Tensor) or x.dtype == torch.float64 else x.float()
