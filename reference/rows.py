"""The expert block in two halves: rows of experts, and sums of a token's rows (see dskernels/moe/rows.py).

The backward is autograd's, applied to the meaning of the rows. Names and arguments are those of
dskernels/moe/triton_experts.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dskernels.dispatch import differentiating
from dskernels.moe.packed import KEPT, PACKED, empty_kept, is_packed
from dskernels.reference import moe
from dskernels.reference.experts import _gate_up, _given, _weight


def expert_rows(
    x, w13, w13_scale, w2, w2_scale, experts, first, fp8, keep, data, scale
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [T * k, H] sorted by expert, index [T, k], and gate and up, without rows if they are not kept."""
    permuted = moe.permute(_given(x, data, scale), experts.long() - first, w13.shape[0])
    rows = _rows(permuted.x, permuted.offsets, w13, w13_scale, w2, w2_scale, None, fp8, False).to(x.dtype)
    packed = fp8 and bool(keep & PACKED)
    if keep & KEPT:
        return rows, permuted.index, _gate_up(permuted.x.to(x.dtype), w13, w13_scale, permuted.offsets, fp8, packed)
    return rows, permuted.index, empty_kept(x, 0, w13.shape[1], packed)


def expert_rows_backward(
    dout, x, w13, w13_scale, w2, w2_scale, weights, experts, first, gate_up, fp8, needs
) -> tuple[Tensor, ...]:
    """Gradients of the rows of x [T * k, H], of w13, w2 and the weights; empty for those that are not needed."""
    permuted = moe.permute(x, experts.long() - first, w13.shape[0])
    leaves = [permuted.x, w13, w2, weights]
    needed = [i for i, need in enumerate(needs) if need]
    for i in needed:
        leaves[i] = leaves[i].detach().requires_grad_()
    valid = permuted.index >= 0
    places = permuted.index[valid].long()
    with differentiating():
        rows_x, w13, w2, weights = leaves
        of_rows = weights.new_zeros(permuted.index.numel()).index_put((places,), weights[valid])
        packed = is_packed(gate_up)
        rows = _rows(rows_x, permuted.offsets, w13, w13_scale, w2, w2_scale, of_rows, fp8, packed)
        token = torch.arange(len(x), device=x.device)[:, None].expand(valid.shape)[valid]
        out = rows.new_zeros(x.shape).index_add(0, token, rows[places]).to(x.dtype)
        for i in needed:  # what no row depends on has a gradient too: zeros
            out = out + leaves[i].flatten()[:0].sum()
    gradients = iter(torch.autograd.grad(out, [leaves[i] for i in needed], dout))
    return tuple(next(gradients) if need else dout.new_empty(0) for need in needs)


def expert_rows_backward_inputs(
    dout, x, w13, w13_scale, w2, w2_scale, weights, experts, first, gate_up, fp8
) -> tuple[Tensor, ...]:
    """Gradients of the rows of x and of the weights; what is returned for the other half is not used in this
    reference."""
    block = x, w13, w13_scale, w2, w2_scale, weights, experts, first
    dx, _, _, dweights = expert_rows_backward(dout, *block, gate_up, fp8, [True, False, False, True])
    nothing = (dout.new_zeros(experts.numel(), n) for n in (w13.shape[1], w13.shape[1] // 2))
    return dx, dweights, *nothing


def expert_rows_backward_weights(
    dout, x, w13, w13_scale, w2, w2_scale, weights, experts, first, gate_up, dgate_up, hidden, fp8, needs
) -> tuple[Tensor, ...]:
    """Gradients of w13 and w2; it uses nothing from the other half."""
    block = x, w13, w13_scale, w2, w2_scale, weights, experts, first
    _, dw13, dw2, _ = expert_rows_backward(dout, *block, gate_up, fp8, [False, *needs, False])
    return dw13, dw2


def sum_rows(rows: Tensor, index: Any, weights: Any, came: Any, places: Any, residual: Any, out: Tensor) -> None:
    """For each token, the sum of its rows with their weights, of its rows in `came`, and of `residual`, in this
    order."""
    index = torch.arange(rows.shape[0], device=rows.device)[:, None] if index is None else index
    total = _added(moe._wide(out).new_zeros(out.shape), rows, index, weights)
    if came is not None:
        total = _added(total, came, places, None)
    out.copy_(total if residual is None else total + residual)


def _added(total: Tensor, rows: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """Add the rows of each token, in fp32, in the order of their places; a place outside of `rows` adds nothing."""
    valid = (index >= 0) & (index < rows.shape[0])
    for j in range(index.shape[1]):
        if rows.shape[0] == 0:
            break
        term = moe._wide(rows)[torch.where(valid[:, j], index[:, j], 0)]
        term = term if weights is None else weights[:, j, None] * term
        total = total + torch.where(valid[:, j, None], term, 0)
    return total


def _rows(x, offsets, w13, w13_scale, w2, w2_scale, weights, fp8, packed) -> Tensor:
    """The rows of each expert sent through it, times their weights; rows after the last expert's are zero."""
    ends = offsets.tolist()
    w13s, w2s = (moe._matrices(_weight(w, scale)) for w, scale in ((w13, w13_scale), (w2, w2_scale)))
    made = []
    for up, down, begin, end in zip(w13s, w2s, ends[:-1], ends[1:], strict=True):
        part = None if weights is None else weights[begin:end]
        keep = "fp8" if packed else "input"
        made.append(moe.feed_forward(x[begin:end], up, down, part, fp8=fp8, dispatched=True, keep=keep))
    made.append(x.new_zeros(x.shape[0] - ends[-1], w2.shape[1]))
    return torch.cat(made)
