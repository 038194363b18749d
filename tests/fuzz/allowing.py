"""How far apart two right implementations may be in e4m3, or where attention rounds keys on the way.

Element by element, in fp64.

Sums. Tensor cores keep 13 to 14 bits while they add up 128 products of e4m3 (`E4M3_SUMS` in dskernels/parity): 32
products and what there is so far are cut off at 2^-13 of the largest of them, so that of each about 0.3 * 2^-13 of that
is lost, in one direction or the other; of 128 products about sqrt(130) times as much, 2^-11.5. The largest is no more
than the root of the sum of the terms' squares, or the sum. Allowed is six times that: 2^-9 of both. Sums in fp32 lose
less than 2^-20 of them.

Steps. A network quantises what is between its two products. Where that lies as near to the middle of two neighbours in
e4m3 as the first product may be off, one implementation may take the one and another the other: a whole step, an eighth
of the number at most, times a weight of the second product. Elsewhere both take the same. Each of these may go either
way, so together they come to the root of the sum of squares; four times that is allowed, which is all of up to 16 steps
at once. A number in the wrong tile, with another's scale, or lost, is outside of it (tests/fuzz/test_judging.py).

Attention. Where keys are projected from latents, or queries are instead (absorbed), or rows in e4m3 are multiplied out,
what comes of it is rounded to the dtype of the queries. Each term of a score is off by 0.42 * 2^-8 of it (bf16) in one
direction or the other, by each of the two implementations, so a score by 0.6 * 2^-8 of the root of the sum of its
terms' squares. Allowed is six times that, 2^-6, times the scale. The result moves by what the scores are off, weighed
by what each takes, times how far its value is from the result; values and what each takes are rounded likewise. At
DeepSeek-V3's sizes and a scale of 1, scores of 77 are off by 0.4, and implementations were apart by 17% of the largest
number where scores of two keys are alike. It stays within the values: twice the largest is the most.

Handing on. What is between is rounded to the dtype of the tokens: relatively, and where it is subnormal (in fp16 below
6e-5, which products of small weights reach) to a grid whose step is that dtype's least number, of which two
implementations may take neighbours.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import exact
from dskernels.reference.fp8 import quantize
from dskernels.types import Fp8Tensor

SUMS = {"cuda": 2.0**-9, "cpu": 2.0**-20}
BETWEEN = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}  # as sums are handed on
STEEPEST = 1.1  # of silu


def numbers(x: Tensor | Fp8Tensor, block: tuple[int, int], scale_format: str = "fp32") -> Tensor:
    """What an operand stands for once it is quantised."""
    return exact.exact(
        x if isinstance(x, Fp8Tensor) else quantize(x.detach().float(), block, scale_format=scale_format)
    )


def sums(a: Tensor, b: Tensor, loss: float) -> Tensor:
    """Of a @ b.T, how far its elements may be off."""
    return loss * (_root(a, b) + (a @ b.T).abs())


def _root(a: Tensor, b: Tensor) -> Tensor:
    """Of the sum of the squares of the terms of a @ b.T."""
    return (a.square() @ b.square().T).sqrt()


def least(dtype: torch.dtype) -> float:
    """The smallest number above zero: the step between those that are subnormal."""
    limits = torch.finfo(dtype)
    return limits.tiny * limits.eps


def handed_on(x: Tensor, dtype: torch.dtype) -> Tensor:
    """By how much two roundings of `x` to a dtype may be apart."""
    return BETWEEN[dtype] * x.abs() + (least(dtype) if BETWEEN[dtype] else 0.0)


def tokens(x: Tensor, quantized: Fp8Tensor | None) -> Tensor:
    """What the first product takes."""
    return numbers(x if quantized is None else quantized, (1, 128))


def network(x: Tensor, w13: Any, w2: Any, loss: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The result for the quantised tokens `x`, and how far it may be off where sums are handed on in `dtype`."""
    up, down = (numbers(w, (128, 128)) for w in (w13, w2))
    gate_up = x @ up.T
    off = sums(x, up, loss) + handed_on(gate_up, dtype)
    (gate, value), (off_gate, off_value) = gate_up.tensor_split(2, -1), off.tensor_split(2, -1)
    silu = gate * gate.sigmoid()
    hidden = silu * value
    off = STEEPEST * off_gate * value.abs() + (silu.abs() + STEEPEST * off_gate) * off_value + 2.0**-20 * hidden.abs()
    hidden, off = _rounded(hidden, off)
    result = hidden @ down.T
    return result, 4 * _root(off, down) + sums(hidden, down, loss) + handed_on(result, dtype)


def _rounded(x: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """`x` in e4m3 in tiles of 128 columns, and how far that may be from what becomes of a number `off` away."""
    columns = x.shape[1]
    x, off = (F.pad(t, (0, -columns % 128)).unflatten(1, (-1, 128)) for t in (x, off))
    largest = x.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / 448, 1.0)
    stretched = off.amax(-1, keepdim=True) / largest.clamp(min=1e-300)  # by how much the scale may differ
    q = x.abs() / scale
    off = off / scale + q * stretched
    step = 2.0 ** ((q + off).clamp(min=2.0**-6).log2().floor() - 3)
    near = ((q / step).frac() - 0.5).abs() * step <= off
    rounded = q.clamp(max=448.0).float().to(torch.float8_e4m3fn).double() * x.sign() * scale
    apart = (torch.where(near, step + off, 0.0) + q * stretched) * scale
    return rounded.flatten(1)[:, :columns], apart.flatten(1)[:, :columns]


def feed_forward(loss: float, x: Tensor, w13: Any, w2: Any, quantized: Fp8Tensor | None, fp8: bool, **_: Any) -> Tensor:
    """Of the network alone."""
    if not (fp8 or isinstance(w13, Fp8Tensor) or isinstance(w2, Fp8Tensor)):
        return torch.zeros(())
    return network(tokens(x, quantized), w13, w2, loss, x.dtype)[1]


def fused_experts(
    loss: float,
    x: Tensor,
    w13: Any,
    w2: Any,
    routing: Any,
    shared: Any,
    n_shared: int,
    quantized: Fp8Tensor | None,
    fp8: bool,
    **_: Any,
) -> Tensor:
    """Of the block, whose networks' errors are weighted as they are."""
    if not (fp8 or any(isinstance(w, Fp8Tensor) for w in (w13, w2, *(shared or ())))):
        return torch.zeros(())
    rows = tokens(x, quantized)
    networks = list(zip(_matrices(w13), _matrices(w2), strict=True))
    weights, ids = exact.exact(routing.weights).abs(), routing.experts.cpu()
    off = torch.zeros_like(rows)
    for e, (up, down) in enumerate(networks):
        everyones = e >= len(networks) - n_shared
        shares = torch.ones(len(rows), 1).double() if everyones else (weights * (ids == e)).sum(1, keepdim=True)
        off += shares * network(rows, up, down, loss, x.dtype)[1]
    return off if shared is None else off + network(rows, shared[0], shared[1], loss, x.dtype)[1]


ROUNDED = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 2.0**-17}


def _attention(q: Tensor, keys: list[Tensor], v: Tensor, seen: Tensor, scale: float, u: float) -> tuple[Tensor, Tensor]:
    """Of queries [..., n, D] of which each sees so many of the keys [..., S, D] and values [..., S, V].

    The keys come with what else is multiplied by what, to the same scores: pairs of queries and keys.
    """
    keys, v = [x.nan_to_num(0.0) for x in keys], v.nan_to_num(0.0)  # what is NaN is not compared
    score = scale * q @ keys[0].mT
    hidden = torch.arange(score.shape[-1]) >= seen[:, None]
    p = score.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    off = abs(scale) * u * (q.square() @ keys[0].square().mT).sqrt()
    if len(keys) > 1:
        off += abs(scale) * u * (keys[1].square() @ keys[2].square().mT).sqrt()
    grown = (2 * off.masked_fill(hidden, 0.0).amax(-1, keepdim=True)).clamp(max=50.0).exp()
    square, out = (p * off).square(), p @ v
    spread = square @ v.square() - 2 * out * (square @ v) + out.square() * square.sum(-1, keepdim=True)
    apart = grown * spread.clamp(min=0.0).sqrt() + u * (p.square() @ v.square()).sqrt()
    return apart.clamp(max=2 * float(v.abs().max())), grown[..., 0] * square.sum(-1).sqrt()


def mla_decode(loss: float, q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float,
               value_dim: int, q_lengths: Tensor | None, **_: Any) -> list[Tensor]:  # fmt: skip
    """Of the result and the log-sum-exp, over rows in e4m3."""
    batch, queries, heads, _ = q.shape
    out, lse = torch.zeros(batch, queries, heads, value_dim).double(), torch.zeros(batch, heads, queries).double()
    if cache.dtype != torch.uint8:
        return [out, lse]
    for b in range(batch):
        n = queries if q_lengths is None else min(max(int(q_lengths[b]), 0), queries)
        rows = _cached(cache, block_table, lengths, b, value_dim)
        if n and len(rows):
            seen = len(rows) - n + 1 + torch.arange(n)
            of = exact.exact(q[b, :n]).transpose(0, 1)
            parts = _attention(of, [rows], rows[:, :value_dim], seen, float(scale), ROUNDED.get(q.dtype, 0.0))
            out[b, :n], lse[b, :, :n] = parts[0].transpose(0, 1), parts[1]
    return [out, lse]


def mla_prefill_cached(loss: float, q: Tensor, kv_b: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor,
                       cu_seqlens_q: Tensor, scale: float, **_: Any) -> list[Tensor]:  # fmt: skip
    """Of the result and the log-sum-exp, keys and values being projected, or queries and results."""
    (tokens, heads, head_dim), latent = q.shape, kv_b.shape[1]
    weights = exact.exact(kv_b).unflatten(0, (heads, -1))
    row = cache.shape[2]
    rope = (row - latent - 4 * -(-latent // 128)) // 2 if cache.dtype == torch.uint8 else row - latent
    own = head_dim - rope
    out = torch.zeros(tokens, heads, weights.shape[1] - own).double()
    lse = torch.zeros(heads, tokens).double()
    ends = cu_seqlens_q.tolist()
    for b, (start, end) in enumerate(itertools.pairwise(ends)):
        rows = _cached(cache, block_table, lengths, b, latent)
        if not (0 <= start < end <= tokens and len(rows)):
            continue
        of = exact.exact(q[start:end]).transpose(0, 1)
        kv = torch.einsum("sl,hxl->hsx", rows[:, :latent], weights)
        keys = torch.cat([kv[..., :own], rows[:, latent:].expand(heads, -1, -1)], -1)
        absorbed = torch.cat([of[..., :own] @ weights[:, :own], of[..., own:]], -1)
        seen = len(rows) - (end - start) + 1 + torch.arange(end - start)
        parts = _attention(of, [keys, absorbed, rows], kv[..., own:], seen, float(scale), ROUNDED.get(q.dtype, 0.0))
        out[start:end], lse[:, start:end] = parts[0].transpose(0, 1), parts[1]
    return [out, lse]


def _cached(cache: Tensor, block_table: Tensor, lengths: Tensor, b: int, latent: int) -> Tensor:
    """The rows that a request has."""
    length = min(max(int(lengths[b]), 0), block_table.shape[1] * cache.shape[1] if len(cache) else 0)
    return exact.cached_rows(cache.cpu(), block_table[b].tolist(), length, latent)


def _matrices(stack: Tensor | Fp8Tensor) -> list[Tensor | Fp8Tensor]:
    """The matrix of each expert."""
    if isinstance(stack, Tensor):
        return [*stack]
    return [Fp8Tensor(data, scale, stack.block) for data, scale in zip(stack.data, stack.scale, strict=True)]
