"""The public operation for attention of packed new tokens to everything cached of their requests."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dskernels.cuda.driver import recorder
from dskernels.device import multiprocessors
from dskernels.dispatch import OPERATIONS, Operation
from dskernels.grouped_gemm.api import grouped_gemm
from dskernels.mla.cache.layout import check_latent_cache, fp8_row_bytes
from dskernels.mla.prefill.absorbed import absorbed, is_absorbed
from dskernels.mla.prefill.api import FLOATS, mla_prefill_op
from dskernels.mla.prefill.config import QUERY_TILE, heads_at_a_time
from dskernels.reference import mla as reference
from dskernels.repeated import repeated
from dskernels.validate import ceil_div, check_float, check_tensor

# Of keys and values that are written out at a time: 8,192 tokens of 128 heads, or 32,768 of 32.
CHUNK_BYTES = 2**29


@repeated
def mla_prefill_cached(
    q: Tensor,
    kv_b: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from packed new tokens to all that is cached of their requests, themselves included.

    [k_s, v_s] = kv_b c_s for every head and cached latent c_s, then attention as in :func:`mla_prefill`, with the
    cached rope part as the shared key. Keys and values are expanded half a gigabyte at a time: those of some heads or,
    if a few heads fill that but not the GPU, of some positions, whose results are merged as by :func:`merge_states`.
    With up to 160 new tokens per request on average (more if there are few heads), attention is absorbed instead, if
    the Hopper kernel of :func:`mla_decode` supports it: W^UK is applied to the query and W^UV to the result, and
    nothing is expanded.

    Args:
        q: bf16, fp16 or fp32 ``[T, H, nope + rope]``. (fp64 runs on the reference.)
        kv_b: ``[H * (nope + V), latent]`` in q's dtype: of each head the rows of its key, then those of its value.
        cache: ``[pages, page_size, latent + rope]`` in q's dtype, or uint8 ``[pages, page_size, bytes]`` with e4m3
            rows: see :func:`write_latent_cache`. It already holds the new tokens.
        block_table: int32 ``[B, pages per request]``. As only the device knows the lengths, memory is allocated for all
            latents that the table has room for, and all but the Hopper kernels expand that many: pass only the columns
            that are in use.
        lengths: int32 ``[B]``, cached positions of each request, the new tokens included.
        cu_seqlens_q: int32 ``[B + 1]``, ascending from 0: the new tokens of request b are the rows from
            ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``, and its last positions.
        scale: factor of the scores.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        out ``[T, H, V]`` in q's dtype, and the natural-log log-sum-exp of the scaled scores, fp32 ``[H, T]`` (fp64 with
        q). Token i of n sees the positions below lengths[b] - n + 1 + i; where there are none, out is 0 and lse -inf.
        Where a score is +inf, both are NaN.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, strides or devices do not fit, or `scale` is not finite.

    Lengths are taken between 0 and what the table holds, page ids between 0 and the last page, cu_seqlens_q as by
    :func:`mla_prefill`. Nothing waits for the device. Not differentiable.
    Source: DeepSeek-V3 report (arXiv 2412.19437), eqs. 2, 4, 5 and 10; FlashInfer (arXiv 2501.01005), section 2.2.
    """
    check_tensor("q", q, dtype=FLOATS, shape=("T", "H", "nope + rope"))
    _, heads, head_dim = q.shape
    check_tensor("kv_b", kv_b, dtype=q.dtype, shape=("H * (nope + V)", "latent"), like=q)
    check_tensor("cache", cache, dtype=(q.dtype, torch.uint8), shape=("pages", "page_size", "row"), like=q)
    latent_dim = kv_b.shape[1]
    rope_dim = _rope_dim(cache, latent_dim)
    if not 0 < rope_dim < head_dim:
        raise ValueError(
            f"cache: expected a row of latent {latent_dim} and a rope part of 1 to {head_dim - 1}, "
            f"got {list(cache.shape)} of {str(cache.dtype).removeprefix('torch.')}"
        )
    check_latent_cache("cache", cache, latent_dim, rope_dim, dtype=q.dtype, like=q)
    nope_dim = head_dim - rope_dim
    if heads == 0 or kv_b.shape[0] % heads or kv_b.shape[0] <= heads * nope_dim:
        raise ValueError(
            f"kv_b: expected more than {nope_dim} rows (a key's and a value's) for each of {heads} heads, "
            f"got {kv_b.shape[0]}"
        )
    check_tensor("block_table", block_table, dtype=torch.int32, shape=("B", "pages per request"), like=q)
    requests = block_table.shape[0]
    check_tensor("lengths", lengths, dtype=torch.int32, shape=(requests,), like=q)
    check_tensor("cu_seqlens_q", cu_seqlens_q, dtype=torch.int32, shape=(requests + 1,), like=q)
    check_float("scale", scale)
    return _mla_prefill_cached(q, kv_b, cache, block_table, lengths, cu_seqlens_q, scale, impl=impl)


# ---- registration: flat arguments in, flat tensors out --------------------------------------------------------------


def _prefill_cached(
    q: Tensor,
    kv_b: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    cu_q: Tensor,
    scale: float,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    addressable = block_table.numel() * cache.shape[1] if cache.shape[0] else 0
    rope_dim = _rope_dim(cache, kv_b.shape[1])
    if addressable and is_absorbed(q, kv_b, cache, block_table, lengths, rope_dim, scale, impl):
        return absorbed(q, kv_b, cache, block_table, lengths, cu_q, rope_dim, scale, impl)
    heads, bytes_of_head = q.shape[1], addressable * kv_b.shape[0] // q.shape[1] * kv_b.element_size()
    requests = max(len(lengths), 1)
    tiles = requests * ceil_div(q.shape[0], requests * QUERY_TILE)
    together = heads_at_a_time(heads, bytes_of_head, CHUNK_BYTES, tiles, multiprocessors(q.device))
    attend = _by_heads if together else _by_positions
    return attend(q, kv_b, cache, block_table, lengths, cu_q, scale, addressable, together, impl)


def _by_heads(
    q: Tensor,
    kv_b: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    cu_q: Tensor,
    scale: float,
    addressable: int,
    together: int,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """Keys and values of all positions, of some heads at a time: nothing has to be merged."""
    tokens, heads, head_dim = q.shape
    latent_dim, rope_dim = kv_b.shape[1], _rope_dim(cache, kv_b.shape[1])
    capacity = block_table.shape[1] * cache.shape[1] if addressable else 0
    if together < heads and (recording := recorder.get()) is not None:
        # It would keep the keys and values of all heads at once; each part takes longer than the host.
        recording.refuse("keys and values of some heads make room for those of others")
    cu, first, ends = _pack_lengths(lengths, capacity, impl=impl)
    row = _gather(cache, block_table, cu, first, 0, addressable, latent_dim, rope_dim, q.dtype, impl=impl)
    latent, k_rope = row.tensor_split([latent_dim], 1)
    of_head = kv_b.shape[0] // heads

    def project(start: int, count: int) -> tuple[Tensor, ...]:
        kv = _project(latent, kv_b[start * of_head : (start + count) * of_head], ends, impl)
        return kv.unflatten(1, (count, of_head)).tensor_split([head_dim - rope_dim], -1)

    if together == heads:
        k, v = project(0, heads)
        return mla_prefill_op(q, k, k_rope, v, cu_q, cu, scale, True, q.dtype, impl=impl)
    out = q.new_empty(tokens, heads, of_head - head_dim + rope_dim)
    lse = q.new_empty((heads, tokens), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    for start in range(0, heads, together):
        some = slice(start, min(start + together, heads))
        k, v = project(start, some.stop - start)
        _prefill_some(q[:, some], k, k_rope, v, cu_q, cu, scale, out[:, some], lse[some], impl=impl)
        del k, v  # before the next ones are made
    return out, lse


def _project(latent: Tensor, weight: Tensor, ends: Tensor, impl: str | None) -> Tensor:
    """[rows, N]; rows from ends[1] on hold anything, as ends[0] is 0.

    A grouped product leaves them out, which only the device knows: of a table twice as wide as what is in use 1,024 new
    tokens over 7,168, four requests of 16 heads, took 745 us, and 906 with cuBLAS. Of one in use both take the same.
    """
    if latent.shape[0] and impl in (None, "hopper"):
        matrices = weight[None]
        if OPERATIONS["grouped_gemm"].choose((latent, None, matrices, None, ends, latent.dtype)).impl == "hopper":
            return grouped_gemm(latent, matrices, ends)
    out = latent.new_empty(latent.shape[0], weight.shape[0])
    return torch.mm(latent, weight.t(), out=out)


def _by_positions(
    q: Tensor,
    kv_b: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    cu_q: Tensor,
    scale: float,
    addressable: int,
    together: int,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """First the new tokens among themselves, causal; then the positions before them, which all of them see."""
    tokens, heads, head_dim = q.shape
    latent_dim, rope_dim = kv_b.shape[1], _rope_dim(cache, kv_b.shape[1])
    capacity = block_table.shape[1] * cache.shape[1] if addressable else 0
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32  # parts are rounded once, when all are merged

    lengths = lengths.clamp(0, capacity)
    new = torch.minimum(lengths, cu_q.clamp(0, tokens).diff().clamp(min=0))
    past = lengths - new
    cu_new, cu_past = pad(torch.stack([new, past]).cumsum(1, dtype=torch.int32), (1, 0))

    def project(cu: Tensor, first: Tensor, start: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """k, k_rope, v of rows `start` to `start + rows` of packed positions, those of request b from first[b] on."""
        row = _gather(cache, block_table, cu, first, start, rows, latent_dim, rope_dim, q.dtype, impl=impl)
        ends = (cu[:: max(len(cu) - 1, 1)] - start).clamp(0, rows)  # of the first row, and behind the last
        kv = _project(row[:, :latent_dim], kv_b, ends, impl).unflatten(1, (heads, -1))
        k, v = kv.tensor_split([head_dim - rope_dim], -1)
        return k, row[:, latent_dim:], v

    keys = project(cu_new, past, 0, tokens if addressable else 0)
    out, lse = mla_prefill_op(q, *keys, cu_q, cu_new, scale, True, wide, impl=impl)
    chunk = min(max(CHUNK_BYTES // (kv_b.shape[0] * kv_b.element_size()), 1), max(addressable, 1))
    for start in range(0, addressable, chunk):
        del keys  # before the next ones are made
        keys = project(cu_past, torch.zeros_like(past), start, chunk)
        _prefill_onto(q, *keys, cu_q, (cu_past - start).clamp(0, chunk), scale, out, lse, impl=impl)
    return out.to(q.dtype), lse


def _some_reference(
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    part = reference.mla_prefill(q, k, v, cu_q, cu_k, scale=scale, k_rope=k_rope)
    for x, y in zip((out, lse), part, strict=True):
        x.copy_(y)


def _onto_reference(
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    part = reference.mla_prefill(q.to(out.dtype), k, v, cu_q, cu_k, scale=scale, causal=False, k_rope=k_rope)
    for x, merged in zip((out, lse), reference.merge_states(out, lse, *part), strict=True):
        x.copy_(merged)


def _gather_reference(
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    first: Tensor,
    start: int,
    rows: int,
    latent_dim: int,
    rope_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows `start` to `start + rows` of the packed positions: cu_seqlens[b] is first[b] of request b, and so on."""
    pages, page_size, _ = cache.shape
    if block_table.numel() == 0 or pages == 0:
        return cache.new_empty((rows, latent_dim + rope_dim), dtype=dtype)
    packed = torch.arange(start, start + rows, device=cache.device)
    request = torch.searchsorted(cu_seqlens[1:], packed, right=True).clamp(max=len(first) - 1)
    position = (packed - cu_seqlens[request] + first[request]).clamp(min=0)
    entry = (position // page_size).clamp(max=block_table.shape[1] - 1)
    row = cache[block_table[request, entry].long().clamp(0, pages - 1), position % page_size]
    return (reference.unpack_fp8(row, latent_dim) if cache.dtype == torch.uint8 else row).to(dtype)


def _pack_lengths_reference(lengths: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    cu = pad(lengths.clamp(0, capacity).cumsum(0, dtype=torch.int32), (1, 0))
    return cu, torch.zeros_like(lengths), cu[[0, -1]]


def _rope_dim(cache: Tensor, latent_dim: int) -> int:
    """Width of the rope part of a row."""
    width = cache.shape[2]
    return (width - fp8_row_bytes(latent_dim, 0)) // 2 if cache.dtype == torch.uint8 else width - latent_dim


def _fake(q, kv_b, cache, block_table, lengths, cu_q, scale):
    tokens, heads, head_dim = q.shape
    nope_dim = head_dim - _rope_dim(cache, kv_b.shape[1])
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(tokens, heads, kv_b.shape[0] // heads - nope_dim)
    return out, q.new_empty((heads, tokens), dtype=lse_dtype)


_mla_prefill_cached = Operation(
    "mla_prefill_cached(Tensor q, Tensor kv_b, Tensor cache, Tensor block_table, Tensor lengths, Tensor cu_seqlens_q, "
    "float scale) -> (Tensor, Tensor)",
    composite=_prefill_cached,
    fake=_fake,
)
# Causal attention of some of the heads, into their part of what is that of all.
_prefill_some = Operation(
    "mla_prefill_some(Tensor q, Tensor k, Tensor? k_rope, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "float scale, Tensor(a!) out, Tensor(b!) lse) -> ()",
    reference=_some_reference,
    triton="dskernels.mla.prefill.triton:mla_prefill_some",
    hopper="dskernels.mla.prefill.hopper:mla_prefill_some",
)
# Attention to some keys, not causal, merged into what attention to others gave.
_prefill_onto = Operation(
    "mla_prefill_onto(Tensor q, Tensor k, Tensor? k_rope, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "float scale, Tensor(a!) out, Tensor(b!) lse) -> ()",
    reference=_onto_reference,
    triton="dskernels.mla.prefill.triton:mla_prefill_onto",
    hopper="dskernels.mla.prefill.hopper:mla_prefill_onto",
)
# All positions of requests, packed: where each begins, and the last ends; its first position, 0; begin and end of all.
_pack_lengths = Operation(
    "pack_lengths(Tensor lengths, int capacity) -> (Tensor, Tensor, Tensor)",
    reference=_pack_lengths_reference,
    triton="dskernels.mla.prefill.triton_gather:pack_lengths",
    hopper="dskernels.mla.prefill.triton_gather:pack_lengths",  # it moves a few integers
    fake=lambda lengths, capacity: tuple(lengths.new_zeros(n) for n in (len(lengths) + 1, len(lengths), 2)),
)
# Rows after the last packed position hold anything.
_gather = Operation(
    "gather_latents(Tensor cache, Tensor block_table, Tensor cu_seqlens, Tensor first, int start, int rows, "
    "int latent_dim, int rope_dim, ScalarType dtype) -> Tensor",
    reference=_gather_reference,
    triton="dskernels.mla.prefill.triton_gather:gather_latents",
    hopper="dskernels.mla.prefill.triton_gather:gather_latents",  # it moves bytes, which needs no more
    fake=lambda cache, table, cu, first, start, rows, latent_dim, rope_dim, dtype: cache.new_empty(
        (rows, latent_dim + rope_dim), dtype=dtype
    ),
)
