"""Decode of requests that begin with the same tokens: the prefix is read once for all of them (see
docs/prefix_sharing.md)."""

from __future__ import annotations

from torch import Tensor

import dskernels as ds

MOST_ROWS = 4096  # query rows that the Hopper kernel takes for one request


def decode_with_prefix(
    q: Tensor,
    cache: Tensor,
    prefix_table: Tensor,
    prefix_length: Tensor,
    suffix_table: Tensor,
    suffix_lengths: Tensor,
    *,
    scale: float,
    value_dim: int = 512,
) -> tuple[Tensor, Tensor]:
    """What `mla_decode` gives for requests whose cached tokens are those of one prefix, then each request's own.

    Args:
        q: ``[B, Q, H, D]``, contiguous.
        cache: as `mla_decode` takes it.
        prefix_table: int32 ``[1, pages]``, the pages of the prefix, all of them full.
        prefix_length: int32 ``[1]``.
        suffix_table: int32 ``[B, pages]``, the pages of each request behind the prefix.
        suffix_lengths: int32 ``[B]``, tokens there, the Q new ones included.
        scale: factor of the scores.
        value_dim: dimension of the latent.

    Returns:
        out ``[B, Q, H, value_dim]`` and lse ``[B, H, Q]``.
    """
    batch, q_tokens, heads, _ = q.shape
    # All queries see the whole prefix: to it they are heads of a single token, of one request or, as there is a limit,
    # of several that have the same pages.
    rows = q_tokens * heads
    together = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * rows <= MOST_ROWS))
    groups = batch // together
    out, lse = ds.mla_decode(
        q.view(groups, 1, together * rows, -1),
        cache,
        prefix_table.expand(groups, -1),
        prefix_length.repeat(groups),
        scale=scale,
        value_dim=value_dim,
    )
    prefix = out.view(batch, q_tokens, heads, -1), lse.view(batch, q_tokens, heads).transpose(1, 2).contiguous()
    suffix = ds.mla_decode(q, cache, suffix_table, suffix_lengths, scale=scale, value_dim=value_dim)
    return ds.merge_states(*prefix, *suffix)
