"""Multi-head latent attention: the latent cache, decode over it, prefill, and the merging of partial results.

Suffixes: T tokens, B requests, Q new tokens of a request, S cached positions, H heads, G groups of heads that share a
key, R heads of a group, L latent (512), P rope (64), N the part of a head without rope (128), D head (L + P = 576
absorbed, N + P = 192 otherwise), V value.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dskernels.reference.fp8 import quantize, rmsnorm
from dskernels.types import Fp8Tensor

TILE = 128  # latent elements that share one scale in an fp8 cache


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each adjacent pair of the last dimension by its angle; the result stays interleaved.

    ``(x[2i], x[2i+1]) -> (x[2i] cos_i - x[2i+1] sin_i, x[2i] sin_i + x[2i+1] cos_i)``, RoFormer
    (arXiv 2104.09864), eq. 34. cos and sin broadcast against ``x[..., ::2]``.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def write_latent_cache(
    kv: Tensor,
    k_rope: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    *,
    eps: float,
) -> Tensor:
    """Store everything that attention needs of each token at its slot of the paged cache, in place.

    A row is ``[RMSNorm(kv), RoPE(k_rope)]``: c^KV and k^R of the DeepSeek-V3 report (arXiv 2412.19437), eqs. 1 and 3.
    Slots outside the cache are skipped.
    """
    dtype = _compute_dtype(kv)
    latent_TL = rmsnorm(kv.to(dtype), norm_weight.to(dtype), eps)
    rope_TP = apply_rope(k_rope.to(dtype), cos.to(dtype), sin.to(dtype))
    if cache.dtype == torch.uint8:
        row = pack_fp8(latent_TL, rope_TP)
    else:
        row = torch.cat([latent_TL, rope_TP], dim=-1).to(cache.dtype)
    pages, page_size = cache.shape[:2]
    stored = (slots >= 0) & (slots < pages * page_size)
    cache[slots[stored] // page_size, slots[stored] % page_size] = row[stored]
    return cache


def pack_fp8(latent: Tensor, rope: Tensor) -> Tensor:
    """The row of bytes of a token: the latent in e4m3, one fp32 scale for each 128 elements, the rope part in bf16."""
    q = quantize(latent, (1, TILE))
    parts = [q.data, q.scale, rope.to(torch.bfloat16)]
    return torch.cat([part.clone(memory_format=torch.contiguous_format).view(torch.uint8) for part in parts], dim=-1)


def unpack_fp8(row: Tensor, latent_dim: int) -> Tensor:
    """The inverse of `pack_fp8`: ``[latent, rope]`` in fp32."""
    n_scales = math.ceil(latent_dim / TILE)
    data, scale, rope = row.split([latent_dim, 4 * n_scales, row.shape[-1] - latent_dim - 4 * n_scales], dim=-1)
    latent = data.contiguous().view(torch.float8_e4m3fn).float()
    scale = scale.contiguous().view(torch.float32).repeat_interleave(TILE, -1)[..., :latent_dim]
    return torch.cat([latent * scale, rope.contiguous().view(torch.bfloat16).float()], dim=-1)


def read_latent_cache(cache: Tensor, block_table: Tensor, lengths: Tensor, latent_dim: int) -> Tensor:
    """The cached rows of each request in order, ``[B, S, latent + rope]``; zero from ``lengths`` on.

    Position s of request b is row ``s % page_size`` of page ``block_table[b, s // page_size]``.
    """
    row_BSD = cache[block_table.long().clamp(0, cache.shape[0] - 1)].flatten(1, 2)
    if cache.dtype == torch.uint8:
        row_BSD = unpack_fp8(row_BSD, latent_dim)
    position_S = torch.arange(row_BSD.shape[1], device=cache.device)
    return row_BSD.masked_fill((position_S >= lengths[:, None])[..., None], 0.0)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention and its log-sum-exp; a query that sees nothing gives 0 and -inf, a score of +inf gives NaN.

    ``lse = log sum_s exp(scale q.k_s)``, ``out = sum_s exp(scale q.k_s - lse) v_s`` over the visible s.
    q ``[..., Q, H, D]``, k ``[..., S, G, D]``, v ``[..., S, G, V]``, visible bool ``[..., Q, S]``.
    """
    q_QGRD = q.unflatten(-2, (k.shape[-2], -1))
    score_GRQS = torch.einsum("...qgrd,...sgd->...grqs", q_QGRD, k) * scale
    score_GRQS = score_GRQS.masked_fill(~visible[..., None, None, :, :], -math.inf)
    lse_GRQ = score_GRQS.logsumexp(-1)
    p_GRQS = torch.exp(score_GRQS - lse_GRQ.masked_fill(lse_GRQ == -math.inf, 0.0)[..., None])
    out_QGRV = torch.einsum("...grqs,...sgv->...qgrv", p_GRQS, v)
    # With an infinite score the output is inf / inf; an lse of +inf would make `merge_states` drop it.
    lse_GRQ = lse_GRQ.masked_fill(lse_GRQ == math.inf, math.nan)
    return out_QGRV.flatten(-3, -2), lse_GRQ.flatten(-3, -2)


def mla_decode_queries(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries in the space of the cached latents: ``[q^C W^UK, RoPE(q^R)]`` for each head, W^UK absorbed.

    (q W) . c = q . (W c), DeepSeek-V2 (arXiv 2405.04434), 2.1.2.
    """
    dtype = _compute_dtype(q)
    nope = w_uk.shape[1]
    latent_THL = torch.einsum("thn,hnl->thl", q[..., :nope].to(dtype), w_uk.to(dtype))
    rope_THP = apply_rope(q[..., nope:].to(dtype), cos[:, None].to(dtype), sin[:, None].to(dtype))
    return torch.cat([latent_THL, rope_THP], dim=-1).to(q.dtype)


def mla_values_quantize(latents: Tensor, w_uv: Tensor) -> Fp8Tensor:
    """Quantise each head's values ``W^UV c`` [T, H * V] in 1x128 tiles; W^UV is absorbed into the side of the output.

    DeepSeek-V2 (arXiv 2405.04434), 2.1.2.
    """
    dtype = _compute_dtype(latents)
    values_THV = torch.einsum("thl,hvl->thv", latents.to(dtype), w_uv.to(dtype))
    return quantize(values_THV.flatten(1))


def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    value_dim: int = 512,
    q_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorbed attention of a few new tokens over the cache: all heads share one key, whose latent part is the value.

    ``out_h = sum_s softmax_s(scale (q_h^L . c_s + q_h^R . k_s^R)) c_s``, with W^UK already in q and W^UV left to the
    caller (DeepSeek-V2, arXiv 2405.04434, 2.1.2). New token j of n sees the positions below ``length - n + 1 + j``.
    """
    dtype = _compute_dtype(q)
    lengths = lengths.clamp(0, block_table.shape[1] * cache.shape[1])
    kv_BSD = read_latent_cache(cache, block_table, lengths, value_dim).to(dtype)[:, :, None]

    j_Q = torch.arange(q.shape[1], device=q.device)
    n_B = torch.full_like(lengths, q.shape[1]) if q_lengths is None else q_lengths.clamp(0, q.shape[1])
    end_BQ = torch.where(j_Q < n_B[:, None], lengths[:, None] - n_B[:, None] + 1 + j_Q, 0)
    visible_BQS = torch.arange(kv_BSD.shape[1], device=q.device) < end_BQ[..., None]

    out_BQHV, lse_BHQ = attention(q.to(dtype), kv_BSD, kv_BSD[..., :value_dim], visible_BQS, scale)
    return out_BQHV.to(q.dtype), lse_BHQ


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
    """Attention within each of several packed sequences; `k_rope` is the part of the key that all heads share.

    ``out_i = sum_s softmax_s(scale q_i.k_s) v_s`` (DeepSeek-V3 report, eqs. 4 and 10), causal as if the last query of a
    sequence stood at its last key.
    """
    dtype = _compute_dtype(q)
    if k_rope is not None:
        k = torch.cat([k, k_rope[:, None].expand(-1, k.shape[1], -1)], dim=-1)
    q_THD, k_TGD, v_TGV = q.to(dtype), k.to(dtype), v.to(dtype)
    out_THV = q_THD.new_zeros(*q.shape[:2], v.shape[-1])
    lse_HT = q_THD.new_full((q.shape[1], q.shape[0]), -math.inf)
    for rows, columns in zip(_spans(cu_seqlens_q), _spans(cu_seqlens_k), strict=True):
        q_s, k_s, v_s = q_THD[rows], k_TGD[columns], v_TGV[columns]
        visible = torch.ones(len(q_s), len(k_s), dtype=torch.bool, device=q.device)
        if causal:
            visible = visible.tril(len(k_s) - len(q_s))
        out_THV[rows], lse_HT[:, rows] = attention(q_s, k_s, v_s, visible, scale)
    return out_THV.to(q.dtype), lse_HT


def mla_prefill_cached(
    q: Tensor,
    kv_b: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of packed new tokens to their whole cached sequence, which includes them, expanded by `kv_b`.

    For each head ``[k_s^C, v_s] = kv_b c_s`` and ``k_s = [k_s^C, k_s^R]``, then causal attention (DeepSeek-V3 report,
    eqs. 2, 4, 5 and 10).
    """
    dtype = _compute_dtype(q)
    heads, head_dim = q.shape[1:]
    latent_dim = kv_b.shape[1]
    lengths = lengths.clamp(0, block_table.shape[1] * cache.shape[1])
    row_BSD = read_latent_cache(cache, block_table, lengths, latent_dim).to(dtype)
    c_BSL, rope_BSP = row_BSD.tensor_split([latent_dim], -1)
    nope_dim = head_dim - rope_BSP.shape[-1]
    kv_BSHX = (c_BSL @ kv_b.to(dtype).T).unflatten(-1, (heads, -1))
    k_BSHN, v_BSHV = kv_BSHX.tensor_split([nope_dim], -1)
    k_BSHD = torch.cat([k_BSHN, rope_BSP[:, :, None].expand(-1, -1, heads, -1)], dim=-1)

    out_THV = q.new_zeros(*q.shape[:2], v_BSHV.shape[-1], dtype=dtype)
    lse_HT = q.new_full((heads, q.shape[0]), -math.inf, dtype=dtype)
    for b, rows in enumerate(_spans(cu_seqlens_q)):
        q_s = q[rows].to(dtype)
        end_Q = lengths[b] - len(q_s) + 1 + torch.arange(len(q_s), device=q.device)
        visible = torch.arange(k_BSHD.shape[1], device=q.device) < end_Q[:, None]
        out_THV[rows], lse_HT[:, rows] = attention(q_s, k_BSHD[b], v_BSHV[b], visible, scale)
    return out_THV.to(q.dtype), lse_HT


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    ``lse = log(e^lse_a + e^lse_b)``, ``out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b`` (arXiv 2501.01005, 2.2);
    out ``[..., Q, H, V]``, lse ``[..., H, Q]``. An lse of -inf (or of +inf, as some kernels write it) marks a state
    that saw nothing.
    """
    dtype = _compute_dtype(out_a)
    both_HQ = torch.stack([lse_a.to(dtype), lse_b.to(dtype)], dim=-1)
    both_HQ = both_HQ.masked_fill(both_HQ.isinf(), -math.inf)
    lse_HQ = both_HQ.logsumexp(-1)
    w_QH = torch.exp(both_HQ - lse_HQ.masked_fill(lse_HQ == -math.inf, 0.0)[..., None]).transpose(-2, -3)
    w_a, w_b = w_QH[..., :1], w_QH[..., 1:]
    out = w_a * out_a.to(dtype).masked_fill(w_a == 0, 0.0) + w_b * out_b.to(dtype).masked_fill(w_b == 0, 0.0)
    return out.to(out_a.dtype), lse_HQ


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _spans(cu_seqlens: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in itertools.pairwise(cu_seqlens.clamp(min=0).tolist())]
