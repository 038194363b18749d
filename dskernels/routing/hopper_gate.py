"""The gradients of the gate on Hopper: cuBLAS products of the logits' fp32 gradient, divided into pieces of bf16.

With the pieces side by side, [T, 3 E], both products are plain bf16 products that accumulate in fp32. For 16,384 tokens
of 2,048 and 64 experts, the kernel of triton_gate.py, which divides its tiles while it multiplies, takes 370 and 220 us
on an H200; reading the hidden states, or writing their gradient, takes 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.portable import launch
from dskernels.routing.triton_gate import piece
from dskernels.validate import ceil_div

PIECES = 3
FEWEST_TOKENS = 2048  # fewer tokens only take the time of launches, of which there are two in triton_gate.py
BLOCK = 1024


@triton.jit(do_not_specialize=["n"])
def pieces_kernel(p_x, p_out, n, E, PIECES: tl.constexpr, BLOCK: tl.constexpr):
    """The pieces of each number of a [T, E] matrix, each piece E columns after the preceding one."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    x = tl.load(p_x + o_n, mask=m_n, other=0.0)
    p_piece = p_out + o_n // E * E * PIECES + o_n % E
    for i in tl.static_range(PIECES):
        tl.store(p_piece + i * E, piece(x, i), mask=m_n)


def gate_backward(
    dlogits: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and of `weight`, bf16, empty if not needed; `dlogits` is fp32 [T, E]."""
    (T, H), E = x.shape, weight.shape[0]
    split = torch.empty((T, PIECES * E), dtype=torch.bfloat16, device=x.device)
    launch(pieces_kernel, (ceil_div(T * E, BLOCK),), dlogits, split, T * E, E, PIECES=PIECES, BLOCK=BLOCK)
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if needs_x:
        dx = torch.mm(split, weight.repeat(PIECES, 1))
    if needs_weight:
        parts = torch.mm(split.mT, x, out_dtype=torch.float32)
        dweight = parts.view(PIECES, E, H).sum(0).to(weight.dtype)
    return dx, dweight


def gate_backward_supports(dlogits: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool) -> str | None:
    """Why these products do not take these arguments, or None."""
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16 or dlogits.dtype != torch.float32:
        return f"it takes hidden states and weights in bf16, they are {x.dtype} and {weight.dtype}"
    if x.shape[0] < FEWEST_TOKENS:
        return f"the Triton kernel has fewer launches, there are fewer than {FEWEST_TOKENS} tokens"
    if x.shape[1] % 8 or weight.shape[0] % 8 or not dlogits.is_contiguous():
        return f"rows must be of whole 16 bytes, there are {x.shape[1]} columns and {weight.shape[0]} experts"
    return None
