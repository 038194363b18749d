"""Absorbed attention of few new tokens to a long cache: it reads the latents as they are, instead of expanding them.

Per cached position and head, expanding key and value costs 2 * 512 * 256 operations once, and then 640 for each new
token; absorbed, each new token costs 2,176, and its query and result are projected instead. So up to about 150 new
tokens of a request (such as a turn of a conversation) are cheaper absorbed; 8 cost a sixteenth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dskernels.device import capability, multiprocessors
from dskernels.dispatch import OPERATIONS, Operation
from dskernels.mla.decode.api import mla_decode
from dskernels.mla.prefill.config import absorbed_group, absorbing_pays, most_groups

# New tokens per request, on average, up to which attention is absorbed if tiles of queries fill the GPU. Microseconds
# on an H200, expanded and absorbed: over 32,768 positions, 128 heads, for 16 tokens 2,332 and 295, 64 2,343 and 883,
# 160 2,844 and 2,070; four requests of 8,192, 16 heads, for 16 tokens 341 and 99, 160 384 and 348, 192 385 and 400; one
# of 4,096, 128 heads, for 160 tokens 365 and 357, 192 367 and 403.
MOST_TOKENS = 160


def is_absorbed(
    q: Tensor,
    kv_b: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rope_dim: int,
    scale: float,
    impl: str | None,
) -> bool:
    """Whether absorbed attention is faster; this was measured for decode's Hopper kernel against prefill's."""
    (tokens, heads, _), requests, latent_dim = q.shape, lengths.shape[0], kv_b.shape[1]
    if impl not in (None, "hopper") or not q.is_cuda or capability(q.device) != (9, 0):
        return False
    if not absorbing_pays(tokens, requests, heads, MOST_TOKENS, multiprocessors(q.device)):
        return False
    group = absorbed_group(heads)
    queries = q.new_empty(1).expand(most_groups(tokens, requests, group), group, heads, latent_dim + rope_dim)
    arguments = queries, cache, block_table, lengths, lengths, scale, latent_dim
    return OPERATIONS["mla_decode"].choose(arguments).impl == "hopper"


@torch.no_grad()
def absorbed(
    q: Tensor,
    kv_b: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    cu_q: Tensor,
    rope_dim: int,
    scale: float,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """Attention output [T, H, V] and log-sum-exp [H, T]."""
    (_, heads, head_dim), latent_dim = q.shape, kv_b.shape[1]
    w_uk, w_uv = kv_b.unflatten(0, (heads, -1)).tensor_split([head_dim - rope_dim], 1)  # [H, nope, L], [H, V, L]
    group = absorbed_group(heads)
    # Between our own launches just two products of torch's, with `out=`, so that all of it is recorded.
    q, queries, place, table, seen, count = _group_tokens(
        q, block_table, lengths, cu_q, group, cache.shape[1], latent_dim, rope_dim, impl=impl
    )
    torch.bmm(q[..., : head_dim - rope_dim].transpose(0, 1), w_uk, out=queries[..., :latent_dim].transpose(0, 1))
    queries = queries.unflatten(0, (-1, group))
    latents, lse = mla_decode(
        queries, cache, table, seen, scale=scale, value_dim=latent_dim, q_lengths=count, impl=impl
    )
    out = q.new_empty(len(q), heads, w_uv.shape[1])
    torch.bmm(latents.flatten(0, 1).transpose(0, 1), w_uv.mT, out=out.transpose(0, 1))
    return _take_results(out, lse, place, impl=impl)


# ---- registration ---------------------------------------------------------------------------------------------------


def _group_tokens_reference(
    q: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    cu_seqlens_q: Tensor,
    group: int,
    page_size: int,
    latent_dim: int,
    rope_dim: int,
) -> tuple[Tensor, ...]:
    tokens, (requests, columns) = len(q), block_table.shape

    def count_up(n: int) -> Tensor:
        return torch.arange(n, dtype=torch.int32, device=lengths.device)

    groups = most_groups(tokens, requests, group)
    edges = torch.cat((lengths.new_zeros(1), cu_seqlens_q.clamp(0, tokens), lengths.new_full((1,), tokens)))
    numbers = count_up(groups)
    span = torch.searchsorted(edges[:-1] // group + count_up(requests + 2), numbers, right=True) - 1
    start, length = edges[span], edges[span + 1] - edges[span]
    first = (numbers - start // group - span.int()) * group
    count = (length - first).clamp(0, group)
    request = (span - 1).clamp(0, requests - 1)
    seen = lengths[request].clamp(0, columns * page_size) - length + first + count
    seen = torch.where((span >= 1) & (span <= requests), seen.clamp(min=0), 0)
    slots = count_up(group)
    real = slots < count[:, None]
    token = torch.where(real, (start + first)[:, None] + slots, 0).clamp(0, tokens - 1).flatten()
    place = lengths.new_zeros(tokens)  # each token has one, unless cu_seqlens does not ascend
    place[token[real.flatten()].long()] = count_up(groups * group)[real.flatten()]
    grouped = q.index_select(0, token)
    queries = q.new_empty(len(token), q.shape[1], latent_dim + rope_dim)
    queries[..., latent_dim:] = grouped[..., q.shape[2] - rope_dim :]
    return grouped, queries, place, block_table[request], seen.int(), count.int()


def _group_tokens_fake(
    q: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    cu_seqlens_q: Tensor,
    group: int,
    page_size: int,
    latent_dim: int,
    rope_dim: int,
) -> tuple[Tensor, ...]:
    tokens, heads, width = q.shape
    groups = most_groups(tokens, block_table.shape[0], group)
    made = (q.new_empty(groups * group, heads, n) for n in (width, latent_dim + rope_dim))
    return *made, *(
        lengths.new_empty(size) for size in ((tokens,), (groups, block_table.shape[1]), (groups,), (groups,))
    )


# Packed new tokens in groups of up to `group` tokens of one request. For each place in a group the row of q of its
# token [P, H, nope + rope], and its query [P, H, latent + rope], of which so far only the rope part is written; the
# place of each token; for each group its row of the table, how many positions its last token sees, and its tokens.
_group_tokens = Operation(
    "group_tokens(Tensor q, Tensor block_table, Tensor lengths, Tensor cu_seqlens_q, int group, int page_size, "
    "int latent_dim, int rope_dim) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_group_tokens_reference,
    triton="dskernels.mla.prefill.triton_groups:group_tokens",
    hopper="dskernels.mla.prefill.triton_groups:group_tokens",  # it moves bytes, which needs no more
    fake=_group_tokens_fake,
)


def _take_results_reference(out: Tensor, lse: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    place = place.clamp(0, out.shape[0] - 1)
    return out.index_select(0, place), lse.transpose(0, 1).flatten(1).index_select(1, place)


def _take_results_fake(out: Tensor, lse: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    _, heads, width = out.shape
    return out.new_empty(place.shape[0], heads, width), lse.new_empty(heads, place.shape[0])


# Of out [P, H, V] and lse [groups, H, group] the row of each token's place: [T, H, V] and [H, T].
_take_results = Operation(
    "take_results(Tensor out, Tensor lse, Tensor place) -> (Tensor, Tensor)",
    reference=_take_results_reference,
    triton="dskernels.mla.prefill.triton_groups:take_results",
    hopper="dskernels.mla.prefill.triton_groups:take_results",
    fake=_take_results_fake,
)
