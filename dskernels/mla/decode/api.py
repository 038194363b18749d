"""The public operation for attention of new tokens to the latent cache."""

from __future__ import annotations

import torch
from torch import Tensor

from dskernels.dispatch import Operation
from dskernels.mla.cache.layout import check_latent_cache
from dskernels.reference import mla as reference
from dskernels.repeated import repeated
from dskernels.validate import HALF_OR_SINGLE, check_float, check_int, check_tensor


@repeated
def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    value_dim: int = 512,
    q_lengths: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from a few new tokens to the paged latent cache, absorbed: all heads share one key, and its latent part is
    the value.

    out[b, j, h] = sum over s of softmax_s(scale * q[b, j, h] . c[b, s]) * c[b, s, :value_dim], where c[b, s] is row
    ``s % page_size`` of page ``block_table[b, s // page_size]`` and s < lengths[b]. Causal among the new tokens: token
    j of n = q_lengths[b] (or Q) sees the positions s < lengths[b] - n + 1 + j. W^UK is already in q; W^UV is left to
    the caller.

    Args:
        q: bf16, fp16 or fp32 ``[B, Q, H, D]``, D = value_dim + rope dimension (576 in DeepSeek-V3); last dimension
            contiguous. Any Q works; the kernels are tuned for 1 to 8. (fp64 runs on the reference.)
        cache: ``[pages, page_size, D]`` in q's dtype, or uint8 ``[pages, page_size, bytes]`` with e4m3 rows: value_dim
            bytes of e4m3, one fp32 scale for each 128 of them, the rope part in bf16 (656 bytes in DeepSeek-V3). Any
            page size.
        block_table: int32 ``[B, pages per request]``, the pages of each request in order; entries that no position
            below lengths[b] needs may hold anything.
        lengths: int32 ``[B]``, cached positions of each request, the new tokens included.
        scale: factor of the scores.
        value_dim: dimension of the latent. The Triton kernels take multiples of 16 up to 512, and rope dimensions up to
            64.
        q_lengths: int32 ``[B]``, how many of the Q tokens of each request are real; the others are padding on the
            right.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        out ``[B, Q, H, value_dim]`` in q's dtype, and the natural-log log-sum-exp of the scaled scores, fp32
        ``[B, H, Q]`` (fp64 with q). Padding tokens and tokens that see nothing (length 0) have out 0 and lse -inf,
        tokens with a score of +inf NaN for both. Repeated calls return the same bits.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, strides or devices do not fit, or `scale` is not finite.

    Lengths are taken between 0 and what the table holds, q_lengths between 0 and Q, page ids between 0 and the last
    page: nothing is read out of bounds, whatever they hold. Rows of the cache at or beyond lengths[b] are never used,
    NaN or not. Nothing waits for the device, so that a CUDA graph may replay with other lengths and tables. Not
    differentiable.
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2.
    """
    check_tensor("q", q, dtype=(*HALF_OR_SINGLE, torch.float64), shape=("B", "Q", "H", "D"))
    check_float("scale", scale)
    check_int("value_dim", value_dim, low=1, high=q.shape[-1] - 1)
    check_latent_cache("cache", cache, value_dim, q.shape[-1] - value_dim, dtype=q.dtype, like=q)
    check_tensor("block_table", block_table, dtype=torch.int32, shape=(q.shape[0], "pages per request"), like=q)
    check_tensor("lengths", lengths, dtype=torch.int32, shape=(q.shape[0],), like=q)
    if q_lengths is not None:
        check_tensor("q_lengths", q_lengths, dtype=torch.int32, shape=(q.shape[0],), like=q)
    return _mla_decode(q, cache, block_table, lengths, q_lengths, scale, value_dim, impl=impl)


# ---- registration ---------------------------------------------------------------------------------------------------


def _reference(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    q_lengths: Tensor | None,
    scale: float,
    value_dim: int,
) -> tuple[Tensor, Tensor]:
    out, lse = reference.mla_decode(
        q, cache, block_table, lengths, scale=scale, value_dim=value_dim, q_lengths=q_lengths
    )
    return out.contiguous(), lse.contiguous()


def _fake(q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, q_lengths: Tensor | None, scale: float, value: int):
    batch, q_tokens, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(batch, q_tokens, heads, value), q.new_empty(batch, heads, q_tokens, dtype=lse_dtype)


_mla_decode = Operation(
    "mla_decode(Tensor q, Tensor cache, Tensor block_table, Tensor lengths, Tensor? q_lengths, float scale, "
    "int value_dim) -> (Tensor, Tensor)",
    reference=_reference,
    hopper="dskernels.mla.decode.hopper:mla_decode",
    triton="dskernels.mla.decode.triton:mla_decode",
    fake=_fake,
)
