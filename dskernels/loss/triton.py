"""Portable Triton kernels of the cross entropy and its gradient: one program per row, which reads the row once in each.

In torch's kernels, 16,384 x 16,384 logits took 2.9 ms of a training step on an H200: they copy the logits to fp32, and
write their softmax and its gradient in fp32. These kernels move 1.6 GB instead of 8.

Names: `p_` pointer, `i_` index of a program, `o_` offsets, `m_` mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.portable import cast, launch

BLOCK = 4096  # columns at a time
WARPS = 8


@triton.jit
def cross_entropy_kernel(p_logits, p_targets, p_nats, p_lse, V, stride_lt, BLOCK: tl.constexpr):
    """The log-sum-exp and the loss, in nats, of one row."""
    i_t = tl.program_id(0).to(tl.int64)
    p_logits += i_t * stride_lt
    # Every lane sums its own columns relative to its own maximum; lanes are combined at the end.
    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        x = tl.load(p_logits + o_v, mask=o_v < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, x, propagate_nan=tl.PropagateNan.ALL)
        # A lane that has only met -inf subtracts 0: -inf - (-inf) would be NaN.
        base = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(highest - base) + tl.exp(x - base)
        highest = higher
    top = tl.max(highest, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    lse = tl.log(tl.sum(total * tl.exp(highest - base), 0)) + base
    target = tl.load(p_targets + i_t).to(tl.int64)
    there = (target >= 0) & (target < V)
    of_target = tl.load(p_logits + tl.where(there, target, 0)).to(tl.float32)
    tl.store(p_lse + i_t, lse)
    tl.store(p_nats + i_t, tl.where(there, lse - of_target, 0.0))


@triton.jit
def cross_entropy_backward_kernel(
    p_dnats, p_logits, p_targets, p_lse, p_dlogits, V, stride_lt, stride_dt, BLOCK: tl.constexpr
):
    """dnats * (softmax - onehot) of one row."""
    i_t = tl.program_id(0).to(tl.int64)
    target = tl.load(p_targets + i_t).to(tl.int64)
    there = (target >= 0) & (target < V)
    dnats = tl.where(there, tl.load(p_dnats + i_t), 0.0)
    lse = tl.load(p_lse + i_t)
    for start in range(0, V, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        x = tl.load(p_logits + i_t * stride_lt + o_v, mask=o_v < V, other=0.0).to(tl.float32)
        p = tl.exp(x - lse) - tl.where(o_v == target, 1.0, 0.0)
        # A row that is left out has no gradient, whatever it holds.
        dx = tl.where(there, dnats * p, 0.0)
        tl.store(p_dlogits + i_t * stride_dt + o_v, cast(dx, p_dlogits.dtype.element_ty), mask=o_v < V)


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nats and log-sum-exp of each row of `logits` [T, V]."""
    T, V = logits.shape
    nats, lse = (logits.new_empty(T, dtype=torch.float32) for _ in range(2))
    if T:
        arguments = logits, targets, nats, lse, V, logits.stride(0)
        launch(cross_entropy_kernel, (T,), *arguments, BLOCK=BLOCK, num_warps=WARPS)
    return nats, lse


def cross_entropy_backward(dnats: Tensor, logits: Tensor, targets: Tensor, lse: Tensor) -> Tensor:
    """Gradient of `logits` [T, V]."""
    T, V = logits.shape
    dlogits = logits.new_empty(T, V)
    if T:
        arguments = dnats, logits, targets, lse, dlogits, V, logits.stride(0), V
        launch(cross_entropy_backward_kernel, (T,), *arguments, BLOCK=BLOCK, num_warps=WARPS)
    return dlogits


def cross_entropy_supports(logits: Tensor, targets: Tensor) -> str | None:
    """Why these kernels do not take the logits, or None."""
    return "they take no fp64" if logits.dtype == torch.float64 else None


def cross_entropy_backward_supports(dnats: Tensor, logits: Tensor, targets: Tensor, lse: Tensor) -> str | None:
    """Why these kernels do not take the logits, or None."""
    return cross_entropy_supports(logits, targets)
