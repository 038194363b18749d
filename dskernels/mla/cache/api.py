"""The public operation that writes to the paged latent cache."""

from __future__ import annotations

import torch
from torch import Tensor

from dskernels.dispatch import Operation
from dskernels.mla.cache.layout import check_latent_cache
from dskernels.reference import mla as reference
from dskernels.repeated import repeated
from dskernels.validate import HALF_OR_SINGLE, check_float, check_tensor, check_written

FLOATS = (*HALF_OR_SINGLE, torch.float64)


@repeated
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
    impl: str | None = None,
) -> Tensor:
    """Normalise the latent of each new token, rotate its shared key, and store both in the paged cache, in place.

    row = [kv / sqrt(mean(kv^2) + eps) * norm_weight, RoPE(k_rope)], where RoPE turns the pair (x[2i], x[2i+1]) by the
    angle of cos[i] and sin[i], and the pairs stay adjacent. Computed in fp32, rounded once to the cache's dtype.

    Args:
        kv: bf16, fp16 or fp32 ``[T, latent]`` (512 in DeepSeek-V3), before its norm; rows may be strided. (fp64 runs on
            the reference.)
        k_rope: ``[T, rope]`` (64) in kv's dtype, before rotation; rows may be strided.
        norm_weight: bf16, fp16 or fp32 ``[latent]``.
        cos: fp32 ``[T, rope / 2]``, of each token's own position.
        sin: likewise.
        cache: ``[pages, page_size, latent + rope]`` bf16, fp16 or fp32, or uint8 ``[pages, page_size, bytes]`` with
            e4m3 rows: latent bytes of e4m3, one fp32 scale (max / 448) for each 128 of them, the rope part in bf16 (656
            bytes in DeepSeek-V3).
        slots: int64 ``[T]``, where each token goes: page * page_size + offset. A slot that is negative or beyond the
            cache is skipped. Slots should differ: a row that several tokens go to may hold parts of each.
        eps: added to the mean square.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        `cache` itself. The Hopper kernel writes the same bits as the reference; e4m3 rows of the portable kernel, which
        sums in another order, agree with them within one e4m3 step and 4 ulp of scale.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, strides or devices do not fit, or `eps` is not finite.

    Other rows of the cache are not touched. Zero tokens launch nothing. Not differentiable.
    Source: DeepSeek-V3 report (arXiv 2412.19437), eqs. 1 and 3; RoFormer (arXiv 2104.09864), eq. 34.
    """
    check_tensor("kv", kv, dtype=FLOATS, shape=("T", "latent"))
    tokens, latent_dim = kv.shape
    check_tensor("k_rope", k_rope, dtype=kv.dtype, shape=(tokens, "rope"), like=kv)
    rope_dim = k_rope.shape[1]
    if rope_dim == 0 or rope_dim % 2:
        raise ValueError(f"k_rope: expected a positive even number of columns, got {rope_dim}")
    check_tensor("norm_weight", norm_weight, dtype=FLOATS, shape=(latent_dim,), like=kv)
    for name, x in (("cos", cos), ("sin", sin)):
        check_tensor(name, x, dtype=torch.float32, shape=(tokens, rope_dim // 2), like=kv)
    check_latent_cache("cache", cache, latent_dim, rope_dim, dtype=FLOATS, like=kv)
    check_written("cache", cache)
    check_tensor("slots", slots, dtype=torch.int64, shape=(tokens,), like=kv)
    check_float("eps", eps)
    with torch.no_grad():  # or autograd would keep each step's inputs, for a cache that then depends on a weight
        _write_latent_cache(kv, k_rope, norm_weight, cos, sin, cache, slots, eps, impl=impl)
    return cache


# ---- registration ---------------------------------------------------------------------------------------------------


def _reference(
    kv: Tensor,
    k_rope: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    eps: float,
) -> None:
    reference.write_latent_cache(kv, k_rope, norm_weight, cos, sin, cache, slots, eps=eps)


_write_latent_cache = Operation(
    "write_latent_cache(Tensor kv, Tensor k_rope, Tensor norm_weight, Tensor cos, Tensor sin, Tensor(a!) cache, "
    "Tensor slots, float eps) -> ()",
    reference=_reference,
    hopper="dskernels.mla.cache.hopper:write_latent_cache",
    triton="dskernels.mla.cache.triton:write_latent_cache",
)
