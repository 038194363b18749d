"""Portable Triton kernels of the load balance: the bias update, the sequence-wise loss and its gradient.

The loss of a batch is a sum over tokens: a token of sequence s adds alpha / (tokens_s * sequences) * sum over e of
f_se * p_e, where p is its own share of affinity. So nothing has to be summed over a sequence but whole numbers, its
choices by expert (integer atomics, the same in any order), and everything else is done token by token. No grid
depends on a length.

All steps are kernels of this file, the zeros of the counters too: a call that consists of them alone is recorded
(dskernels.recording). With torch's `zeros`, `clamp` and `cumsum` among them it cost the host 169 us.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.device import empty
from dskernels.portable import cast, launch
from dskernels.recording import Recorded
from dskernels.routing.config import choose_config
from dskernels.routing.triton import LARGEST, load_affinities, normalized, reason_against, take_best
from dskernels.validate import ceil_div

BEGIN_BLOCK = 1024  # counters that a program sets to zero, and lengths that the first sums up at a time


@triton.jit
def update_bias_kernel(p_bias, p_load, rate, E: tl.constexpr, COLUMNS: tl.constexpr):
    """b += rate * sign(mean load - load), the sign taken in integers."""
    o_e = tl.arange(0, COLUMNS)
    m_e = o_e < E
    load = tl.load(p_load + o_e, mask=m_e, other=0).to(tl.int64)
    lack = tl.sum(load, axis=0) - load * E
    step = tl.where(lack > 0, rate, tl.where(lack < 0, -rate, 0.0))
    tl.store(p_bias + o_e, tl.load(p_bias + o_e, mask=m_e) + step, mask=m_e)


@triton.jit(do_not_specialize=["S", "n_counts"])
def begin_kernel(p_lengths, p_ends, p_tokens, p_counts, p_filled, S, n_counts, BLOCK: tl.constexpr):
    """Zeros for the counters of the next kernel, BLOCK of `counts` a program; the first also sums up the lengths.

    ends[s] is the number of tokens up to the end of sequence s, those of negative length being empty.
    """
    o_i = tl.arange(0, BLOCK)
    o_c = tl.program_id(0).to(tl.int64) * BLOCK + o_i
    zeros = tl.zeros([BLOCK], tl.int32)
    tl.store(p_counts + o_c, zeros, mask=o_c < n_counts)
    if tl.program_id(0) == 0:
        tl.store(p_filled, 0)
        end = tl.zeros([], tl.int64)
        for first in range(0, S, BLOCK):
            o_s = first + o_i
            length = tl.maximum(tl.load(p_lengths + o_s, mask=o_s < S, other=0), 0).to(tl.int64)
            tl.store(p_ends + o_s, end + tl.cumsum(length, 0), mask=o_s < S)
            tl.store(p_tokens + o_s, zeros, mask=o_s < S)
            end += tl.sum(length, 0)


@triton.jit
def sequence_of(p_ends, o_t, S, steps):
    """Number of sequences that end at or before each token, by bisection; S for the tokens after the last."""
    low = tl.zeros(o_t.shape, tl.int32)
    high = low + S
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        after = tl.load(p_ends + middle, mask=open_, other=0) <= o_t
        low = tl.where(open_ & after, middle + 1, low)
        high = tl.where(open_ & ~after, middle, high)
    return low


@triton.jit(do_not_specialize=["T", "S", "steps"])
def count_choices_kernel(
    p_logits,
    p_ends,
    p_sequence,
    p_tokens,
    p_counts,
    p_filled,
    T,
    S,
    steps,
    stride_lt,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Count for ROWS tokens the choices of each (sequence, expert), tokens of each sequence, sequences with any.

    Writes the sequence of each token, -1 where the token counts for none.
    """
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_t = o_t < T
    o_e = tl.arange(0, COLUMNS)
    m_e = o_e < E
    _, s, _, _, void = load_affinities(p_logits, o_t, o_e, m_t, m_e, stride_lt, SOFTMAX)
    sequence = sequence_of(p_ends, o_t, S, steps)
    m_s = m_t & ~void & (sequence < S)
    tl.store(p_sequence + o_t, tl.where(m_s, sequence, -1), mask=m_t)

    p_row = p_counts + sequence.to(tl.int64) * E
    choice = tl.where(m_e[None, :], s, float("-inf"))
    for _ in range(TOP_K):
        i_e, choice = take_best(choice, o_e)
        tl.atomic_add(p_row + i_e, 1, mask=m_s, sem="relaxed")

    # Just one token of a sequence finds 0 tokens before it.
    before = tl.atomic_add(p_tokens + sequence, 1, mask=m_s, sem="relaxed")
    first = tl.sum((m_s & (before == 0)).to(tl.int32), axis=0)
    tl.atomic_add(p_filled, first, mask=first > 0, sem="relaxed")


@triton.jit
def load_factors(p_sequence, p_tokens, p_counts, o_t, o_e, m_t, m_e, E: tl.constexpr, TOP_K: tl.constexpr):
    """(f of eq. 18, 1 / number of tokens) of the sequences of these tokens, zeros where there is none."""
    sequence = tl.load(p_sequence + o_t, mask=m_t, other=-1).to(tl.int64)
    m_s = sequence >= 0
    tokens = tl.load(p_tokens + sequence, mask=m_s, other=1).to(tl.float32)
    counts = tl.load(p_counts + sequence[:, None] * E + o_e[None, :], mask=m_s[:, None] & m_e[None, :], other=0)
    return counts.to(tl.float32) * (E / TOP_K / tokens)[:, None], tl.where(m_s, 1.0 / tokens, 0.0)


@triton.jit(do_not_specialize=["T"])
def token_loss_kernel(
    p_logits,
    p_sequence,
    p_tokens,
    p_counts,
    p_loss,
    T,
    stride_lt,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What ROWS tokens add to the sum over sequences of sum f * P."""
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_t = o_t < T
    o_e = tl.arange(0, COLUMNS)
    m_e = o_e < E
    _, s, _, _, _ = load_affinities(p_logits, o_t, o_e, m_t, m_e, stride_lt, SOFTMAX)
    f, per_token = load_factors(p_sequence, p_tokens, p_counts, o_t, o_e, m_t, m_e, E, TOP_K)
    loss = tl.sum(tl.sum(f * normalized(s), axis=1) * per_token, axis=0)
    tl.store(p_loss + tl.program_id(0), loss)


@triton.jit(do_not_specialize=["n_parts"])
def sum_loss_kernel(p_parts, p_filled, p_out, n_parts, alpha, BLOCK: tl.constexpr):
    """alpha times the sum of the parts, always in the same order, over the number of sequences that hold a token."""
    o_p = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_parts, BLOCK):
        total += tl.load(p_parts + start + o_p, mask=start + o_p < n_parts, other=0.0)
    filled = tl.maximum(tl.load(p_filled), 1).to(tl.float32)
    tl.store(p_out, alpha * tl.sum(total, axis=0) / filled)


@triton.jit(do_not_specialize=["T"])
def balance_loss_backward_kernel(
    p_grad,
    p_logits,
    p_sequence,
    p_tokens,
    p_counts,
    p_filled,
    p_dlogits,
    T,
    alpha,
    stride_lt,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient of the loss to the logits of ROWS tokens.

    p * (f - sum(f * p)) * alpha / tokens / sequences with softmax, with sigmoid that times 1 - s.
    """
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_t = o_t < T
    o_e = tl.arange(0, COLUMNS)
    m_e = o_e < E
    x, s, _, _, _ = load_affinities(p_logits, o_t, o_e, m_t, m_e, stride_lt, SOFTMAX)
    f, per_token = load_factors(p_sequence, p_tokens, p_counts, o_t, o_e, m_t, m_e, E, TOP_K)
    p = normalized(s)
    grad = tl.load(p_grad) * alpha / tl.maximum(tl.load(p_filled), 1).to(tl.float32)
    dx = p * (f - tl.sum(f * p, axis=1)[:, None]) * (grad * per_token)[:, None]
    if not SOFTMAX:
        dx *= 1.0 - s
    dx = tl.where(tl.abs(x) <= LARGEST, dx, 0.0)
    p_dx = p_dlogits + o_t[:, None] * E + o_e[None, :]
    tl.store(p_dx, cast(dx, p_dlogits.dtype.element_ty), mask=m_t[:, None] & m_e[None, :])


# ---- launchers: the arguments of the registered operations ----------------------------------------------------------


def update_bias(bias: Tensor, load: Tensor, rate: float) -> None:
    """Add to `bias` [E] in place."""
    E = bias.shape[0]
    if E == 0:
        return
    launch(update_bias_kernel, (1,), bias, load, rate, E=E, COLUMNS=triton.next_power_of_2(E), num_warps=1)


@Recorded
def balance_loss(logits: Tensor, sequence_lengths: Tensor, top_k: int, alpha: float, softmax: bool) -> Tensor:
    """The loss of `logits` [T, E], a scalar."""
    (T, E), config = logits.shape, choose_config(logits.shape[1])
    if T == 0:
        return logits.new_zeros((), dtype=torch.float32)
    n_parts = ceil_div(T, config.rows)
    loss = empty(logits, (), torch.float32, ())
    sequence, tokens, counts, filled = count_choices(logits, sequence_lengths, top_k, softmax)
    parts = empty(logits, (n_parts,), torch.float32, (1,))
    launch(
        token_loss_kernel,
        (n_parts,),
        logits,
        sequence,
        tokens,
        counts,
        parts,
        T,
        logits.stride(0),
        E=E,
        TOP_K=top_k,
        SOFTMAX=softmax,
        ROWS=config.rows,
        COLUMNS=config.members,
        num_warps=config.num_warps,
    )
    launch(sum_loss_kernel, (1,), parts, filled, loss, n_parts, alpha, BLOCK=1024)
    return loss


@Recorded
def balance_loss_backward(
    grad: Tensor, logits: Tensor, sequence_lengths: Tensor, top_k: int, alpha: float, softmax: bool
) -> Tensor:
    """Gradient to `logits` [T, E] of the loss. It counts the choices again: nothing is kept from the forward pass."""
    (T, E), config = logits.shape, choose_config(logits.shape[1])
    dlogits = empty(logits, (T, E), logits.dtype)
    if T == 0:
        return dlogits
    sequence, tokens, counts, filled = count_choices(logits, sequence_lengths, top_k, softmax)
    launch(
        balance_loss_backward_kernel,
        (ceil_div(T, config.rows),),
        grad,
        logits,
        sequence,
        tokens,
        counts,
        filled,
        dlogits,
        T,
        alpha,
        logits.stride(0),
        E=E,
        TOP_K=top_k,
        SOFTMAX=softmax,
        ROWS=config.rows,
        COLUMNS=config.members,
        num_warps=config.num_warps,
    )
    return dlogits


def count_choices(
    logits: Tensor, sequence_lengths: Tensor, top_k: int, softmax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sequence of each token [T], tokens [S], choices [S, E], number of sequences that hold a token []), all int32."""
    (T, E), S, config = logits.shape, sequence_lengths.shape[0], choose_config(logits.shape[1])
    ends = empty(logits, (S,), torch.int64, (1,))
    sequence, tokens = (empty(logits, (n,), torch.int32, (1,)) for n in (T, S))
    counts, filled = empty(logits, (S, E), torch.int32), empty(logits, (), torch.int32, ())
    launch(
        begin_kernel,
        (max(ceil_div(S * E, BEGIN_BLOCK), 1),),
        sequence_lengths,
        ends,
        tokens,
        counts,
        filled,
        S,
        S * E,
        BLOCK=BEGIN_BLOCK,
        num_warps=4,
    )
    launch(
        count_choices_kernel,
        (ceil_div(T, config.rows),),
        logits,
        ends,
        sequence,
        tokens,
        counts,
        filled,
        T,
        S,
        S.bit_length(),
        logits.stride(0),
        E=E,
        TOP_K=top_k,
        SOFTMAX=softmax,
        ROWS=config.rows,
        COLUMNS=config.members,
        num_warps=config.num_warps,
    )
    return sequence, tokens, counts, filled


def update_bias_supports(bias: Tensor, *args: object) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    return reason_against(bias.shape[0])


def balance_loss_supports(logits: Tensor, *args: object) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    return reason_against(logits.shape[1])


def balance_loss_backward_supports(grad: Tensor, logits: Tensor, *args: object) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    return reason_against(logits.shape[1])
