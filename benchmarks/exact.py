"""What each operation means, in fp64 and the plainest loops: an oracle that shares no code with the library.

Arguments are those of the public functions; e4m3 operands stand for the numbers that they represent. Nothing is rounded
in between, so the distance from these results is the whole error of an implementation or a format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dskernels.types import Fp8Tensor

E4M3 = torch.float8_e4m3fn


def exact(x: Any) -> Tensor:
    """The numbers of a tensor, or those that an `Fp8Tensor` stands for, in fp64 on the CPU."""
    if not isinstance(x, Fp8Tensor):
        return x.detach().cpu().double()
    data, scale = x.data.cpu().float().double(), x.scale.cpu().double()
    rows, cols = (torch.arange(n) // tile for n, tile in zip(data.shape[-2:], x.block, strict=True))
    return data * scale[..., rows[:, None], cols[None, :]]


# ---- quantising -----------------------------------------------------------------------------------------------------


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = exact(gate_up).tensor_split(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def swiglu_gradient(dy: Tensor, gate_up: Tensor) -> Tensor:
    """By the product rule: of silu, s + gate s (1 - s)."""
    gate, up = exact(gate_up).tensor_split(2, -1)
    s = 1 / (1 + torch.exp(-gate))
    return torch.cat([exact(dy) * up * (s + gate * s * (1 - s)), exact(dy) * gate * s], -1)


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    wide = exact(x)
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * exact(weight)


def rmsnorm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """By autograd, of `rmsnorm`."""
    x, weight = exact(x).requires_grad_(), exact(weight).requires_grad_()
    out = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    dx, dweight = torch.autograd.grad(out, (x, weight), exact(dy))
    return dx if dresidual is None else dx + exact(dresidual), dweight


# ---- products -------------------------------------------------------------------------------------------------------


def fp8_gemm(a: Fp8Tensor, b: Fp8Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b.T + bias."""
    out = exact(a) @ exact(b).T
    return out if bias is None else out + exact(bias)


def groups(offsets: Tensor, rows: int) -> Iterator[tuple[int, int]]:
    """First row and end of each group, by the rule for offsets that make no sense."""
    start = 0
    for end in offsets.cpu().tolist()[1:]:
        end = max(start, min(max(end, 0), rows))
        yield start, end
        start = end


def grouped_gemm(a: Tensor | Fp8Tensor, b: Tensor | Fp8Tensor, offsets: Tensor) -> Tensor:
    """Each row by the matrix of its group, and zeros after the last."""
    x, w = exact(a), exact(b)
    out = x.new_zeros(x.shape[0], w.shape[1])
    for e, (start, end) in enumerate(groups(offsets, x.shape[0])):
        out[start:end] = x[start:end] @ w[e].T
    return out


def grouped_gemm_masked(a: Tensor | Fp8Tensor, b: Tensor | Fp8Tensor, counts: Tensor) -> Tensor:
    """The rows that count; NaN, which stands for anything, in the others."""
    x, w = exact(a), exact(b)
    out = x.new_full((*x.shape[:2], w.shape[1]), math.nan)
    for e, count in enumerate(counts.cpu().tolist()):
        count = min(max(count, 0), x.shape[1])
        out[e, :count] = x[e, :count] @ w[e].T
    return out


def grouped_wgrad(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """Sum of outer products of each group's tokens."""
    dy, x = exact(dy), exact(x)
    spans = groups(offsets, x.shape[0])
    return torch.stack([dy[start:end].T @ x[start:end] for start, end in spans])


# ---- experts --------------------------------------------------------------------------------------------------------


def permute(x: Tensor, experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x, offsets, index), by Python's stable sort."""
    ids = experts.cpu().tolist()
    choices = [(e, t, j) for t, row in enumerate(ids) for j, e in enumerate(row)]
    order = sorted((c for c in choices if 0 <= c[0] < n_experts), key=lambda c: c[0])
    rows, index = torch.zeros(len(choices), x.shape[1], dtype=x.dtype), torch.full(experts.shape, -1, dtype=torch.int32)
    for row, (_, t, j) in enumerate(order):
        rows[row], index[t, j] = x[t].detach().cpu(), row
    ends = np.cumsum([sum(c[0] == e for c in order) for e in range(n_experts)])
    return rows, torch.tensor([0, *ends], dtype=torch.int32), index


def combine(y: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of each token's rows; places outside of y add nothing."""
    y, weights, places = exact(y), exact(weights), index.cpu().tolist()
    out = y.new_zeros(len(places), y.shape[1])
    for t, row in enumerate(places):
        for j, r in enumerate(row):
            if 0 <= r < y.shape[0]:
                out[t] += weights[t, j] * y[r]
    return out


def expert(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """w2 @ (silu(gate) * up)."""
    return swiglu(x @ w13.T) @ w2.T


def fused_experts(
    x: Tensor,
    w13: Tensor | Fp8Tensor,
    w2: Tensor | Fp8Tensor,
    weights: Tensor,
    experts: Tensor,
    shared: Sequence[Tensor | Fp8Tensor] | None = None,
    n_shared: int = 0,
) -> Tensor:
    """Token by token, expert by expert."""
    x, up, down, weights = exact(x), exact(w13), exact(w2), exact(weights)
    routed = up.shape[0] - n_shared
    out = torch.zeros_like(x) if shared is None else expert(x, *(exact(w) for w in shared))
    for t, row in enumerate(experts.cpu().tolist()):
        for j, e in enumerate(row):
            if 0 <= e < routed:
                out[t] += weights[t, j] * expert(x[t], up[e], down[e])
    for e in range(routed, up.shape[0]):
        out += expert(x, up[e], down[e])
    return out


# ---- attention ------------------------------------------------------------------------------------------------------


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Adjacent pairs as complex numbers, times cos + i sin; x [T, ..., rope], cos and sin [T, rope / 2]."""
    pairs = torch.view_as_complex(exact(x).contiguous().unflatten(-1, (x.shape[-1] // 2, 2)))
    turn = torch.complex(exact(cos), exact(sin))
    turn = turn.view(turn.shape[0], *[1] * (x.dim() - 2), turn.shape[1])
    return torch.view_as_real(pairs * turn).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One query, one head: q [D], k [S, D], v [S, V]."""
    if k.shape[0] == 0:
        return v.new_zeros(v.shape[1]), v.new_tensor(-math.inf)
    scores = k @ q * scale
    top = scores.max()
    p = torch.exp(scores - top)
    return (p @ v) / p.sum(), top + p.sum().log()


def cached_rows(cache: Tensor, table: Sequence[int], n: int, latent_dim: int) -> Tensor:
    """The first `n` rows of a request, [n, latent + rope]."""
    pages, page_size, _ = cache.shape
    rows = [cache[min(max(table[s // page_size], 0), pages - 1), s % page_size] for s in range(n)]
    if not rows:
        return torch.zeros(0, 1, dtype=torch.float64)
    return torch.stack([_unpacked(row, latent_dim) if row.dtype == torch.uint8 else exact(row) for row in rows])


def _unpacked(row: Tensor, latent_dim: int) -> Tensor:
    tiles = -(-latent_dim // 128)
    data = row[:latent_dim].clone().view(E4M3).float().double()
    scale = row[latent_dim : latent_dim + 4 * tiles].clone().view(torch.float32).double()
    return torch.cat(
        [
            data * scale[torch.arange(latent_dim) // 128],
            exact(row[latent_dim + 4 * tiles :].clone().view(torch.bfloat16)),
        ]
    )


def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    value_dim: int,
    q_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Query by query, head by head."""
    batch, queries, heads, _ = q.shape
    q, cache, table = exact(q), cache.cpu(), block_table.cpu().tolist()
    out, lse = q.new_zeros(batch, queries, heads, value_dim), q.new_full((batch, heads, queries), -math.inf)
    room = block_table.shape[1] * cache.shape[1]
    for b in range(batch):
        n = queries if q_lengths is None else min(max(int(q_lengths[b]), 0), queries)
        length = min(max(int(lengths[b]), 0), room)
        rows = cached_rows(cache, table[b], length, value_dim)
        for j in range(n):
            seen = rows[: max(length - n + 1 + j, 0)]
            for h in range(heads if len(seen) else 0):
                out[b, j, h], lse[b, h, j] = attend(q[b, j, h], seen, seen[:, :value_dim], scale)
    return out, lse


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool = True,
    k_rope: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Query by query, head by head."""
    tokens, heads, _ = q.shape
    q, k, v = exact(q), exact(k), exact(v)
    if k_rope is not None:
        k = torch.cat([k, exact(k_rope)[:, None].expand(-1, k.shape[1], -1)], -1)
    out, lse = q.new_zeros(tokens, heads, v.shape[2]), q.new_full((heads, tokens), -math.inf)
    spans = (pairwise(cu.cpu().tolist()) for cu in (cu_seqlens_q, cu_seqlens_k))
    for (start, end), (first, last) in zip(*spans, strict=True):
        for i in range(start, end):
            stop = last - (end - 1 - i) if causal else last
            for h in range(heads if stop > first else 0):
                g = h * k.shape[1] // heads
                out[i, h], lse[h, i] = attend(q[i, h], k[first:stop, g], v[first:stop, g], scale)
    return out, lse


def mla_prefill_cached(
    q: Tensor,
    kv_b: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    value_dim: int,
) -> tuple[Tensor, Tensor]:
    """Keys and values of every cached row, then `mla_prefill` of the requests one by one."""
    tokens, heads, head_dim = q.shape
    latent, room = kv_b.shape[1], block_table.shape[1] * cache.shape[1]
    per_head = exact(kv_b).unflatten(0, (heads, -1))
    starts, outs, lses = cu_seqlens_q.cpu().tolist(), [], []
    for b, (start, end) in enumerate(pairwise(starts)):
        length = min(max(int(lengths[b]), 0), room)
        rows = cached_rows(cache.cpu(), block_table[b].tolist(), length, latent)
        kv = (
            torch.einsum("sl,hxl->shx", rows[:, :latent], per_head)
            if length
            else rows.new_zeros(0, *per_head.shape[:2])
        )
        own = per_head.shape[1] - value_dim
        cu = (torch.tensor([0, n]) for n in (end - start, length))
        rope_part = rows[:, latent:] if length else rows.new_zeros(0, head_dim - own)
        out, lse = mla_prefill(q[start:end], kv[..., :own], kv[..., own:], *cu, scale=scale, k_rope=rope_part)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, 1)


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """By plain exponentials, relative to the larger; an infinite lse is a state that saw nothing."""
    lses = [torch.where(exact(lse).isinf(), -math.inf, exact(lse)) for lse in (lse_a, lse_b)]
    top = torch.maximum(*lses)
    base = torch.where(top == -math.inf, 0.0, top)
    weights = [torch.exp(lse - base) for lse in lses]
    total = weights[0] + weights[1]  # NaN where one is
    shares = [torch.where(total == 0, 0.0, w / total).mT[..., None] for w in weights]
    parts = [
        torch.where(share == 0, 0.0, exact(out) * share) for share, out in zip(shares, (out_a, out_b), strict=True)
    ]
    return parts[0] + parts[1], base + total.log()


def mla_decode_queries(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[q_nope @ w_uk, rope(q_rope)] of each head."""
    nope = w_uk.shape[1]
    latent = torch.einsum("thn,hnl->thl", exact(q)[..., :nope], exact(w_uk))
    return torch.cat([latent, rope(q[..., nope:], cos, sin)], -1)


def mla_values(latents: Tensor, w_uv: Tensor) -> Tensor:
    """[T, H * V] before it is quantised."""
    return torch.einsum("thl,hvl->thv", exact(latents), exact(w_uv)).flatten(1)


def latent_rows(kv: Tensor, k_rope: Tensor, norm_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """What stands in the cache for each token, before it is rounded."""
    return torch.cat([rmsnorm(kv, norm_weight, eps), rope(k_rope, cos, sin)], -1)


# ---- choosing -------------------------------------------------------------------------------------------------------


def affinities(logits: Tensor, score: str) -> tuple[Tensor, Tensor]:
    """Scores of each token, and which tokens have none."""
    x = exact(logits)
    void = x.isnan().any(-1) | ~x.isfinite().any(-1)
    x = torch.where(void[:, None], 0.0, x).clamp(-(2.0**126), 2.0**126)
    return (1 / (1 + torch.exp(-x)) if score == "sigmoid" else torch.softmax(x, -1)), void


def route_weights(
    logits: Tensor, experts: Tensor, *, score: str = "sigmoid", normalize: bool = True, scale: float = 1.0
) -> Tensor:
    """Weights of the experts that were chosen; which those are is compared as integers, not here."""
    s, void = affinities(logits, score)
    s = s.gather(1, experts.cpu().long())
    if normalize:
        total = s.sum(-1, keepdim=True)
        s = torch.where(total < 1e-30, 0.0, s / total)
    return torch.where(void[:, None], 0.0, scale * s)


def balance_loss(
    logits: Tensor, *, top_k: int, alpha: float, sequence_lengths: Tensor, score: str = "sigmoid"
) -> Tensor:
    """Equations 17 to 20 of the DeepSeek-V3 report, sequence by sequence."""
    s, void = affinities(logits, score)
    chosen = torch.zeros_like(s)
    order = torch.argsort(affinities(logits, score)[0], dim=-1, descending=True, stable=True)[:, :top_k]
    chosen.scatter_(1, order, 1.0)
    losses, start = [], 0
    for length in sequence_lengths.cpu().tolist():
        end = min(start + max(length, 0), len(s))
        tokens = torch.arange(start, end)[~void[start:end]]
        start = end
        if len(tokens):
            f = s.shape[1] / top_k * chosen[tokens].mean(0)
            p = (s[tokens] / s[tokens].sum(-1, keepdim=True)).mean(0)
            losses.append(alpha * (f * p).sum())
    return torch.stack(losses).mean() if losses else torch.zeros((), dtype=torch.float64)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Row by row; 0 where the target is no column."""
    x, columns = exact(logits), logits.shape[1]
    rows = [x[t].logsumexp(0) - x[t, c] if 0 <= c < columns else 0.0 * x[t, 0] for t, c in enumerate(targets.tolist())]
    return torch.stack(rows) if rows else x.new_zeros(0)


def error(got: Tensor, want: Tensor) -> float:
    """Largest distance of an element from the exact one, over the largest exact magnitude.

    A NaN in `want` stands for anything.
    """
    got, want = exact(got), want.double()
    counts = ~want.isnan()
    got, want = got[counts], want[counts]
    same = got == want  # infinities among them
    if bool(same.all()):
        return 0.0
    size = float(want[want.isfinite()].abs().max()) if bool(want.isfinite().any()) else 0.0
    worst = float((got[~same] - want[~same]).abs().nan_to_num(math.inf).max())
    return worst / size if size else math.inf
