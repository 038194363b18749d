"""Portable Triton kernels of the choice of experts, and of its gradient.

A program holds a few tokens, each a row of all its experts in registers. The `top_k` best are found one by one: the
largest value, the smallest column that contains it, and that column is struck out. Rows are laid out group by group, so
that the smallest column is the smallest id; groups and their members are padded to powers of two with columns of -inf.

Names: `p_` pointer, `o_` offsets, `m_` mask, `i_` index; `x` logits, `s` affinities.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.portable import cast, launch
from dskernels.routing.config import MAX_EXPERTS, choose_config
from dskernels.routing.triton_gate import gate
from dskernels.validate import ceil_div

# As in the reference: the value that an infinity counts as, and the smallest sum that is normalised.
LARGEST = tl.constexpr(2.0**126)
LEAST_SUM = tl.constexpr(1e-30)


@triton.jit
def finite(x, void):
    """`x` clamped to +-2^126, and 0 if `void`: no NaN, no infinity."""
    return tl.where(void, 0.0, tl.minimum(tl.maximum(x, -LARGEST), LARGEST))


@triton.jit
def affinity(x, top, mass, SOFTMAX: tl.constexpr):
    """sigmoid(x), or the softmax of a row with maximum `top` whose exponentials sum to `mass`."""
    if SOFTMAX:
        return tl.exp(x - top) / mass
    else:
        e = tl.exp(-tl.abs(x))  # at most 1: never overflows
        return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def load_affinities(p_logits, o_t, o_e, m_t, m_e, stride_lt, SOFTMAX: tl.constexpr):
    """Rows of logits: (x as stored, s with 0 in padding columns, top, mass, void)."""
    # [rows, columns]
    x = tl.load(
        p_logits + o_t[:, None] * stride_lt + o_e[None, :],
        mask=m_t[:, None] & m_e[None, :],
        other=float("-inf"),
    ).to(tl.float32)
    # The largest kind in a row decides: 2 is a NaN, 1 a finite logit, 0 an infinite one.
    kind = tl.where(x != x, 2, tl.where(tl.abs(x) < float("inf"), 1, 0))
    void = tl.max(kind, axis=1) != 1
    bounded = finite(x, void[:, None])
    top = tl.max(bounded, axis=1)
    mass = tl.full(top.shape, 1.0, tl.float32)
    if SOFTMAX:
        mass = tl.sum(tl.where(m_e[None, :], tl.exp(bounded - top[:, None]), 0.0), axis=1)
    s = affinity(bounded, top[:, None], mass[:, None], SOFTMAX)
    return x, tl.where(m_e[None, :], s, 0.0), top, mass, void


@triton.jit
def normalized(s):
    """Rows divided by their sum, or zeros if that is too small."""
    total = tl.sum(s, axis=1)
    return s / tl.where(total < LEAST_SUM, float("inf"), total)[:, None]


@triton.jit
def take_best(value, o_c):
    """The smallest column with the largest value of each row, and the values with that column struck out."""
    best = tl.max(value, axis=1)
    i_c = tl.min(tl.where(value == best[:, None], o_c[None, :], value.shape[1]), axis=1)
    return i_c, tl.where(o_c[None, :] == i_c[:, None], float("-inf"), value)


@triton.jit
def within_best_groups(
    choice,
    SIZE: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """`choice` with all columns struck out except those of the TOP_GROUPS best groups (of SIZE experts)."""
    # [ROWS, GROUPS, MEMBERS]
    grouped = tl.reshape(choice, [ROWS, GROUPS, MEMBERS])
    score = tl.max(grouped, axis=2)
    if not SOFTMAX and SIZE > 1:
        # Strike out one column that has the maximum, not all: a duplicate of it is the second largest.
        o_m = tl.arange(0, MEMBERS)[None, None, :]
        first = tl.min(tl.where(grouped == score[:, :, None], o_m, MEMBERS), axis=2)
        score += tl.max(tl.where(o_m == first[:, :, None], float("-inf"), grouped), axis=2)
    o_g = tl.arange(0, GROUPS)
    kept = tl.zeros([ROWS, GROUPS], tl.int32)
    for _ in range(TOP_GROUPS):
        i_g, score = take_best(score, o_g)
        kept = tl.where(o_g[None, :] == i_g[:, None], 1, kept)
    grouped = tl.where(kept[:, :, None] == 1, grouped, float("-inf"))
    return tl.reshape(grouped, [ROWS, GROUPS * MEMBERS])


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    p_logits,
    p_bias,
    p_weights,
    p_experts,
    p_load,
    p_nonfinite,
    T,
    scale,
    stride_lt,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    N_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """Choose and weigh the experts of ROWS tokens; CHOICES is TOP_K padded."""
    SIZE: tl.constexpr = E // N_GROUPS
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_t = o_t < T
    o_c = tl.arange(0, GROUPS * MEMBERS)
    o_e = o_c // MEMBERS * SIZE + o_c % MEMBERS
    m_e = (o_c // MEMBERS < N_GROUPS) & (o_c % MEMBERS < SIZE)

    _, s, top, mass, void = load_affinities(p_logits, o_t, o_e, m_t, m_e, stride_lt, SOFTMAX)
    choice = s
    if HAS_BIAS:
        bias = tl.load(p_bias + o_e, mask=m_e, other=0.0)
        void = void | (tl.max((bias != bias).to(tl.int32), axis=0) == 1)
        choice += bias[None, :]
    # Finite, so that only what is struck out is -inf, and an expert with a bias of -inf can still be taken.
    choice = tl.where(m_e[None, :], finite(choice, void[:, None]), float("-inf"))
    if TOP_GROUPS < N_GROUPS:
        choice = within_best_groups(choice, SIZE, TOP_GROUPS, SOFTMAX, ROWS, GROUPS, MEMBERS)

    # [ROWS, CHOICES]
    o_k = tl.arange(0, CHOICES)
    column = tl.zeros([ROWS, CHOICES], tl.int32)
    for k in range(TOP_K):
        i_c, choice = take_best(choice, o_c)
        column = tl.where(o_k[None, :] == k, i_c[:, None], column)
    experts = column // MEMBERS * SIZE + column % MEMBERS

    # The chosen logits are read again (they are in L1): picking them from `s` would be one more reduction per choice.
    m_k = m_t[:, None] & (o_k < TOP_K)[None, :]
    x = tl.load(p_logits + o_t[:, None] * stride_lt + experts, mask=m_k, other=0.0).to(tl.float32)
    s_k = tl.where(m_k, affinity(finite(x, void[:, None]), top[:, None], mass[:, None], SOFTMAX), 0.0)
    if NORMALIZE:
        s_k = normalized(s_k)
    p_row = o_t[:, None] * TOP_K + o_k[None, :]
    tl.store(p_weights + p_row, tl.where(void[:, None], 0.0, s_k * scale), mask=m_k)
    tl.store(p_experts + p_row, experts, mask=m_k)

    # Integer atomics: any order gives the same counts.
    tl.atomic_add(p_load + experts, 1, mask=m_k & ~void[:, None], sem="relaxed")
    n_void = tl.sum((m_t & void).to(tl.int32), axis=0)
    tl.atomic_add(p_nonfinite, n_void, mask=n_void > 0, sem="relaxed")


@triton.jit(do_not_specialize=["n", "replicas"])
def place_kernel(p_experts, p_physical, p_placed, n, replicas, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Which of its n places computes each chosen expert: entry t % n of its row, for token t, or -1 for none."""
    o_c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < n
    p_row = p_physical + tl.load(p_experts + o_c, mask=m_c, other=0).to(tl.int64) * replicas
    places = tl.zeros([BLOCK], tl.int32)
    for i in range(replicas):
        places += ((tl.load(p_row + i, mask=m_c, other=-1) >= 0) & (places == i)).to(tl.int32)
    turn = o_c // TOP_K % tl.maximum(places, 1)
    tl.store(p_placed + o_c, tl.load(p_row + turn, mask=m_c & (places > 0), other=-1), mask=m_c)


@triton.jit(do_not_specialize=["T"])
def route_backward_kernel(
    p_grad,
    p_logits,
    p_weights,
    p_experts,
    p_dlogits,
    T,
    scale,
    stride_lt,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """The gradient of the weights w with respect to the logits of ROWS tokens; g is the gradient with respect to the
    weights.

    With u = w * (g - sum(g * w) / scale), or w * g where weights are not normalised, at the chosen experts and 0
    elsewhere: sigmoid gives u * (1 - s), softmax u - s * sum(u). Nothing is divided by s, which may be as good as 0.
    """
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_t = o_t < T
    o_e = tl.arange(0, COLUMNS)
    m_e = o_e < E
    x, s, _, _, _ = load_affinities(p_logits, o_t, o_e, m_t, m_e, stride_lt, SOFTMAX)

    mean = tl.zeros([ROWS], tl.float32)
    if NORMALIZE:
        o_k = tl.arange(0, CHOICES)
        m_k = m_t[:, None] & (o_k < TOP_K)[None, :]
        o_row = o_t[:, None] * TOP_K + o_k[None, :]
        grads = tl.load(p_grad + o_row, mask=m_k, other=0.0)
        weights = tl.load(p_weights + o_row, mask=m_k, other=0.0)
        # If the weight is 0, the gradient may be anything, even NaN: it is left out, not multiplied.
        mean = tl.sum(tl.where(weights != 0, grads * weights, 0.0), axis=1) / tl.where(scale == 0, 1.0, scale)
    u = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(TOP_K):
        i_e = tl.load(p_experts + o_t * TOP_K + k, mask=m_t, other=-1)
        grad = tl.load(p_grad + o_t * TOP_K + k, mask=m_t, other=0.0)
        weight = tl.load(p_weights + o_t * TOP_K + k, mask=m_t, other=0.0)
        u_k = tl.where(weight != 0, weight * (grad - mean), 0.0)
        u = tl.where(o_e[None, :] == i_e[:, None], u_k[:, None], u)
    if SOFTMAX:
        dx = u - s * tl.sum(u, axis=1)[:, None]
    else:
        dx = u * (1.0 - s)
    dx = tl.where(tl.abs(x) <= LARGEST, dx, 0.0)
    p_dx = p_dlogits + o_t[:, None] * E + o_e[None, :]
    tl.store(p_dx, cast(dx, p_dlogits.dtype.element_ty), mask=m_t[:, None] & m_e[None, :])


# ---- launchers: the arguments of the registered operations ----------------------------------------------------------


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    n_groups: int,
    top_groups: int,
    softmax: bool,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weights, experts, load, nonfinite) of `logits` [T, E]."""
    T, E = logits.shape
    weights = logits.new_empty((T, top_k), dtype=torch.float32)
    experts = logits.new_empty((T, top_k), dtype=torch.int32)
    load = logits.new_zeros(E, dtype=torch.int32)
    nonfinite = logits.new_zeros((), dtype=torch.int32)
    if T > 0:
        config = choose_config(E, n_groups)
        launch(
            route_kernel,
            (ceil_div(T, config.rows),),
            logits,
            bias,
            weights,
            experts,
            load,
            nonfinite,
            T,
            scale,
            logits.stride(0),
            E=E,
            TOP_K=top_k,
            N_GROUPS=n_groups,
            TOP_GROUPS=top_groups,
            SOFTMAX=softmax,
            NORMALIZE=normalize,
            HAS_BIAS=bias is not None,
            ROWS=config.rows,
            GROUPS=config.groups,
            MEMBERS=config.members,
            CHOICES=1 << (top_k - 1).bit_length(),
            num_warps=config.num_warps,
        )
    return weights, experts, load, nonfinite


def route_replicated(
    logits: Tensor, bias: Tensor | None, physical: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(weights, experts, load, nonfinite, placed)."""
    weights, experts, load, nonfinite = route(logits, bias, *options)
    return weights, experts, load, nonfinite, place(experts, physical)


def route_hidden(
    x: Tensor, weight: Tensor, bias: Tensor | None, physical: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(weights, experts, load, nonfinite, logits, placed)."""
    logits = gate(x, weight)
    weights, experts, load, nonfinite = route(logits, bias, *options)
    placed = experts.new_empty(0) if physical is None else place(experts, physical)
    return weights, experts, load, nonfinite, logits, placed


def place(experts: Tensor, physical: Tensor) -> Tensor:
    """The place where each chosen expert is computed, [T, k]."""
    placed, n = torch.empty_like(experts), experts.numel()
    if n > 0:
        grid = (ceil_div(n, 512),)
        launch(place_kernel, grid, experts, physical, placed, n, physical.shape[1], TOP_K=experts.shape[1], BLOCK=512)
    return placed


def route_backward(
    grad: Tensor, logits: Tensor, weights: Tensor, experts: Tensor, softmax: bool, normalize: bool, scale: float
) -> Tensor:
    """Gradient to `logits` [T, E] of the `weights` [T, k] of `experts`."""
    (T, E), top_k = logits.shape, experts.shape[1]
    dlogits = torch.empty((T, E), dtype=logits.dtype, device=logits.device)
    if T > 0:
        config = choose_config(E)
        launch(
            route_backward_kernel,
            (ceil_div(T, config.rows),),
            grad,
            logits,
            weights,
            experts,
            dlogits,
            T,
            scale,
            logits.stride(0),
            E=E,
            TOP_K=top_k,
            SOFTMAX=softmax,
            NORMALIZE=normalize,
            ROWS=config.rows,
            COLUMNS=config.members,
            CHOICES=1 << (top_k - 1).bit_length(),
            num_warps=config.num_warps,
        )
    return dlogits


def reason_against(n_experts: int) -> str | None:
    """Why the kernels of this family do not support this many experts, or None."""
    if n_experts > MAX_EXPERTS:
        return f"a program holds all experts of a token in registers: at most {MAX_EXPERTS}, got {n_experts}"
    return None


def route_supports(logits: Tensor, *args: object) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    return reason_against(logits.shape[1])


def route_backward_supports(grad: Tensor, logits: Tensor, *args: object) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    return reason_against(logits.shape[1])


def route_replicated_supports(logits: Tensor, *args: object) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    return reason_against(logits.shape[1])


def route_hidden_supports(x: Tensor, weight: Tensor, *args: object) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    return reason_against(weight.shape[0])
