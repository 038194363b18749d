"""Triton kernels of the optimiser: gradients are added up, and an update made, in one pass that reads each number once.

Names: `p_` pointer, `o_` offsets, `m_` mask.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dskernels.portable import cast, launch
from dskernels.validate import ceil_div

BLOCK = 1024
ADD_BLOCK = 2048
EPS = 1e-8


@triton.jit  # specialised by whether n is a multiple of 16, without which loads are of one number
def adamw_kernel(
    p_master,
    p_gradient,
    p_first,
    p_second,
    p_steps,
    p_rate,
    p_scale,
    p_skip,
    n,
    beta1,
    beta2,
    weight_decay,
    eps,
    BLOCK: tl.constexpr,
):
    """Masters and both moments after `p_steps` updates and this one.

    Gradients are divided by `p_scale`, if it is given. Nothing changes where `p_skip` holds another number than 0.
    """
    left_out = 0.0
    if p_skip is not None:
        left_out = tl.load(p_skip)
    if left_out != 0.0:
        return
    steps = tl.load(p_steps) + 1.0
    rate = tl.load(p_rate)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    master = tl.load(p_master + o_n, mask=m_n, other=0.0)
    gradient = tl.load(p_gradient + o_n, mask=m_n, other=0.0)
    first = tl.load(p_first + o_n, mask=m_n, other=0.0).to(tl.float32)
    second = tl.load(p_second + o_n, mask=m_n, other=0.0).to(tl.float32)
    if p_scale is not None:
        gradient /= tl.load(p_scale)
    master -= rate * weight_decay * master
    first += (gradient - first) * (1.0 - beta1)
    second += (gradient * gradient - second) * (1.0 - beta2)
    step = rate / (1.0 - tl.exp2(steps * tl.log2(beta1)))
    root = tl.sqrt(second) / tl.sqrt(1.0 - tl.exp2(steps * tl.log2(beta2)))
    tl.store(p_master + o_n, master - step * first / (root + eps), mask=m_n)
    tl.store(p_first + o_n, cast(first, p_first.dtype.element_ty), mask=m_n)
    tl.store(p_second + o_n, cast(second, p_second.dtype.element_ty), mask=m_n)


@triton.jit
def add_gradient_kernel(p_total, p_gradient, n, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """A gradient, in fp32, is added to the total, or is the first one of it."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    total = tl.load(p_gradient + o_n, mask=m_n, other=0.0).to(tl.float32)
    if not FIRST:
        total += tl.load(p_total + o_n, mask=m_n, other=0.0)
    tl.store(p_total + o_n, total, mask=m_n)


def add_gradient(total: Tensor, gradient: Tensor, first: bool) -> None:
    """See `dskernels.model.optimizer`."""
    n = total.numel()
    if n:
        grid = (ceil_div(n, ADD_BLOCK),)
        launch(add_gradient_kernel, grid, total, gradient.contiguous(), n, FIRST=first, BLOCK=ADD_BLOCK, num_warps=8)


def adamw(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    learning_rate: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """See `dskernels.model.optimizer`."""
    n = master.numel()
    if n:
        tensors = master, gradient, exp_avg, exp_avg_sq, steps, learning_rate, scale, skip
        launch(adamw_kernel, (ceil_div(n, BLOCK),), *tensors, n, beta1, beta2, weight_decay, EPS, BLOCK=BLOCK)
