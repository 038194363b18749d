"""Decode of requests that begin with the same tokens: the prefix is read once for all of them (see
docs/prefix_sharing.md)."""

from __future__ import annotations

import torch
from torch import Tensor

import dskernels as ds

BLOCK_ROWS = 64  # query rows that a product has
MOST_ROWS = 4096  # query rows that the Hopper kernel takes for one request


def decode_with_prefix(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    prefix_pages: int,
    *,
    scale: float,
    value_dim: int = 512,
) -> tuple[Tensor, Tensor]:
    """What `mla_decode` gives for requests that begin with the same full pages.

    Args:
        q: ``[B, Q, H, D]``, contiguous.
        cache: as `mla_decode` takes it.
        block_table: int32 ``[B, pages]``, whole; the first `prefix_pages` are the same in each row.
        lengths: int32 ``[B]``, whole: the prefix, and then at least the Q new tokens.
        prefix_pages: how many pages are common.
        scale: factor of the scores.
        value_dim: dimension of the latent.

    Returns:
        out ``[B, Q, H, value_dim]`` and lse ``[B, H, Q]``.
    """
    batch, q_tokens, heads, _ = q.shape
    rows = q_tokens * heads
    # A request whose rows fill the blocks that they need leaves little to be gained: less than the launches cost.
    if prefix_pages == 0 or -(-rows // BLOCK_ROWS) * BLOCK_ROWS < 1.2 * rows:
        return ds.mla_decode(q, cache, block_table, lengths, scale=scale, value_dim=value_dim)
    # All queries see the whole prefix: to it they are heads of a single token, of one request or, as there is a limit,
    # of several that have the same pages.
    together = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * rows <= MOST_ROWS))
    groups, prefix = batch // together, prefix_pages * cache.shape[1]
    out, lse = ds.mla_decode(
        q.view(groups, 1, together * rows, -1),
        cache,
        block_table[:groups, :prefix_pages],
        lengths.new_full((groups,), prefix),
        scale=scale,
        value_dim=value_dim,
    )
    before = out.view(batch, q_tokens, heads, -1), lse.view(batch, q_tokens, heads).transpose(1, 2).contiguous()
    own = ds.mla_decode(q, cache, block_table[:, prefix_pages:], lengths - prefix, scale=scale, value_dim=value_dim)
    return ds.merge_states(*before, *own)


def decode_with_written_prefix(
    q: Tensor,
    absorbed: Tensor,
    w_uv: Tensor,
    k: Tensor,
    k_rope: Tensor,
    v: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Values attended to by requests that begin with the same full pages, whose keys and values were written out.

    Args:
        q: ``[B, Q, H, nope + rope]``, contiguous.
        absorbed: the same queries as `mla_decode` takes them, ``[B, Q, H, L + rope]``.
        w_uv: ``[H, V, L]``.
        k: ``[P, H, nope]`` of the P common tokens.
        k_rope: ``[P, rope]``.
        v: ``[P, H, V]``.
        cache: as `mla_decode` takes it.
        block_table: int32 ``[B, pages]``, of what follows the prefix.
        lengths: int32 ``[B]``, likewise, at least the Q new tokens.
        scale: factor of the scores.

    Returns:
        out ``[B * Q, H, V]`` and lse ``[H, B * Q]``.
    """
    batch, q_tokens, heads, _ = q.shape
    queries, ends = batch * q_tokens, torch.arange(2, dtype=torch.int32, device=q.device)
    before = ds.mla_prefill(
        q.flatten(0, 1), k, v, ends * queries, ends * len(k), scale=scale, causal=False, k_rope=k_rope
    )
    latents, lse = ds.mla_decode(absorbed, cache, block_table, lengths, scale=scale, value_dim=w_uv.shape[2])
    own = torch.empty_like(before[0])
    torch.bmm(latents.flatten(0, 1).transpose(0, 1), w_uv.mT, out=own.transpose(0, 1))
    return ds.merge_states(*before, own, lse.transpose(0, 1).reshape(heads, queries).contiguous())
