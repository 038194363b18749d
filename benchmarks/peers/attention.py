"""Peers of attention over a latent cache, of prefill and of merging."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import Peer, attribute, first_attribute


def eager_decode(q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Gather the pages, two batched products and a softmax, in bf16."""
    b, n_q, h, _ = q.shape
    rows = cache[block_table].flatten(1, 2)
    scores = torch.bmm(q.flatten(1, 2), rows.transpose(1, 2)).view(b, n_q, h, -1)
    position = torch.arange(rows.shape[1], device=q.device)
    end = lengths[:, None] - n_q + 1 + torch.arange(n_q, device=q.device)
    hidden = position >= end[..., None]
    p = (scores.float() * scale).masked_fill(hidden[:, :, None], -math.inf).softmax(-1).to(q.dtype)
    return torch.bmm(p.flatten(1, 2), rows[..., :512]).view(b, n_q, h, 512)


def eager_queries(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A batched product straight into its place, and the rotation written out."""
    tokens, heads, width = q.shape
    _, nope, latent = w_uk.shape
    out = q.new_empty(tokens, heads, latent + width - nope)
    torch.bmm(q[..., :nope].transpose(0, 1), w_uk, out=out[..., :latent].transpose(0, 1))
    even, odd = q[..., nope:].float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    out[..., latent:] = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return out


def flashmla_decode(q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float) -> Peer:
    """FlashMLA's dense decode, partial results and combine together."""
    decode, plan = attribute("flash_mla", "flash_mla_with_kvcache"), attribute("flash_mla", "get_mla_metadata")
    schedule, splits = plan(lengths, q.shape[1] * q.shape[2], 1)
    pages = cache.unsqueeze(2)
    return Peer(
        lambda: decode(q, pages, block_table, lengths, 512, schedule, splits, softmax_scale=scale, causal=True),
        lambda out: out[0],
    )


def flashinfer_decode(q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float) -> Peer:
    """FlashInfer's paged MLA attention."""
    wrapper_class = attribute("flashinfer.mla", "BatchMLAPagedAttentionWrapper")
    (b, n_q, h, _), page = q.shape, cache.shape[1]
    wrapper = wrapper_class(torch.empty(128 << 20, dtype=torch.int8, device=q.device))
    n_pages = (lengths + page - 1) // page
    used = torch.arange(block_table.shape[1], device=q.device) < n_pages[:, None]
    wrapper.plan(
        torch.arange(b + 1, device=q.device, dtype=torch.int32) * n_q,
        F.pad(n_pages.cumsum(0), (1, 0)).int(),
        block_table[used],
        lengths,
        h,
        512,
        64,
        page,
        True,
        scale,
        q.dtype,
        cache.dtype,
    )
    q_nope, q_rope = q[..., :512].flatten(0, 1).contiguous(), q[..., 512:].flatten(0, 1).contiguous()
    latent, rope = cache[..., :512], cache[..., 512:]
    return Peer(lambda: wrapper.run(q_nope, q_rope, latent, rope), lambda out: out.view(b, n_q, h, 512))


class Dense(NamedTuple):
    """Packed sequences of one length as torch's SDPA wants them: ``[B, H, S, D]``."""

    q: Tensor
    k: Tensor
    v: Tensor


def dense(q: Tensor, k: Tensor, v: Tensor, batch: int) -> Dense:
    """The packed ``[T, H, D]`` tensors as views of ``[B, H, S, D]``, as leaves that may get a gradient."""
    return Dense(*(t.detach().unflatten(0, (batch, -1)).transpose(1, 2).requires_grad_() for t in (q, k, v)))


def cudnn_attention(x: Dense, scale: float) -> Tensor:
    """torch's SDPA by cuDNN, causal."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, scale=scale)


def cudnn_prefill(q: Tensor, k: Tensor, v: Tensor, batch: int, scale: float) -> Peer:
    """Forward without a graph."""
    x = dense(q, k, v, batch)

    def run() -> Tensor:
        with torch.no_grad():
            return cudnn_attention(x, scale)

    return Peer(run, packed)


def cudnn_prefill_backward(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, batch: int, scale: float) -> Peer:
    """Backward of a forward that was run once."""
    x = dense(q, k, v, batch)
    out = cudnn_attention(x, scale)
    d_out = d_out.unflatten(0, (batch, -1)).transpose(1, 2)
    return Peer(
        lambda: torch.autograd.grad(out, x, d_out, retain_graph=True), lambda grads: tuple(packed(g) for g in grads)
    )


def cudnn_prefill_cached(
    q: Tensor, kv_b: Tensor, cache: Tensor, block_table: Tensor, batch: int, cached: int, scale: float
) -> Peer:
    """Gather the pages, project them, and cuDNN twice: over the positions before the new ones, not causal, and over
    these; merged in eager torch. Every request has `cached` positions and as many new tokens as the others."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    pages, (tokens, heads, head_dim), latent_dim = block_table.long(), q.shape, kv_b.shape[1]
    past, q = cached - tokens // batch, q.unflatten(0, (batch, -1)).transpose(1, 2)
    nope_dim = head_dim - cache.shape[2] + latent_dim

    def part(k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *_ = attend(q, k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, causal, False, scale=scale)
        return out, lse.view(*q.shape[:3], 1)

    def run() -> Tensor:
        rows = cache[pages].flatten(1, 2)[:, :cached]
        k_nope, v = (rows[..., :latent_dim] @ kv_b.t()).unflatten(-1, (heads, -1)).tensor_split([nope_dim], -1)
        k = torch.cat((k_nope, rows[:, :, None, latent_dim:].expand(-1, -1, heads, -1)), -1)
        before, lse_before = part(k[:, :past], v[:, :past], causal=False)
        new, lse_new = part(k[:, past:], v[:, past:], causal=True)
        return torch.lerp(before.float(), new.float(), torch.sigmoid(lse_new - lse_before)).to(q.dtype)

    return Peer(run, packed)


def packed(x: Tensor) -> Tensor:
    """``[B, H, S, D]`` back to ``[T, H, D]``."""
    return x.transpose(1, 2).flatten(0, 1)


def flashinfer_prefill(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Peer:
    """FlashInfer's ragged prefill."""
    wrapper_class = attribute("flashinfer.prefill", "BatchPrefillWithRaggedKVCacheWrapper")
    wrapper = wrapper_class(torch.empty(256 << 20, dtype=torch.uint8, device=q.device), "NHD")
    wrapper.plan(
        cu_seqlens,
        cu_seqlens,
        q.shape[1],
        k.shape[1],
        q.shape[2],
        head_dim_vo=v.shape[2],
        causal=True,
        sm_scale=scale,
        q_data_type=q.dtype,
    )
    return Peer(lambda: wrapper.run(q, k, v))


def flashinfer_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Peer:
    """FlashInfer's merge; its log-sum-exps are ``[T, H]`` and of base 2."""
    merge = attribute("flashinfer", "merge_state")
    s_a, s_b = ((lse * math.log2(math.e)).t().contiguous() for lse in (lse_a, lse_b))
    return Peer(lambda: merge(out_a, s_a, out_b, s_b), lambda out: (out[0], out[1].t() / math.log2(math.e)))


def vllm_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Peer:
    """vLLM's merge."""
    merge = first_attribute(
        "merge_attn_states", "vllm.v1.attention.ops.merge_attn_states", "vllm.attention.ops.merge_attn_states"
    )
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    return Peer(lambda: merge(out, out_a, lse_a, out_b, lse_b, lse), lambda _: (out, lse))
