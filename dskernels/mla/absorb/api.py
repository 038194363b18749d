"""The public operation that prepares queries for absorbed decode."""

from __future__ import annotations

import torch
from torch import Tensor

from dskernels.dispatch import Operation
from dskernels.reference import mla as reference
from dskernels.repeated import repeated
from dskernels.validate import HALF_OR_SINGLE, check_tensor

FLOATS = (*HALF_OR_SINGLE, torch.float64)


@repeated
def mla_decode_queries(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor, *, impl: str | None = None) -> Tensor:
    """Turn the queries of new tokens into those that :func:`mla_decode` takes: W^UK absorbed, the rope part rotated.

    out[t, h] = [q[t, h, :nope] @ w_uk[h], RoPE(q[t, h, nope:])], where RoPE turns the pair (x[2i], x[2i+1]) by the
    angle of cos[t, i] and sin[t, i], and the pairs stay adjacent. Sums in fp32, rounded once to q's dtype.

    Args:
        q: bf16, fp16 or fp32 ``[T, H, nope + rope]`` (128 + 64 in DeepSeek-V3), tokens and heads may be strided. (fp64
            runs on the reference.)
        w_uk: ``[H, nope, latent]`` in q's dtype, each head's up-projection of the key; heads and rows may be strided,
            so that it may be a part of kv_b: ``kv_b.unflatten(0, (H, -1))[:, :nope]``.
        cos: fp32 ``[T, rope / 2]``, of each token's own position; rows may be strided.
        sin: likewise.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        ``[T, H, latent + rope]`` in q's dtype, contiguous: ``out.unflatten(0, (B, -1))`` is what mla_decode takes for B
        requests with as many new tokens each.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, strides or devices do not fit.

    No tokens or heads give an empty result. Not differentiable.
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2; RoFormer (arXiv 2104.09864), eq. 34.
    """
    check_tensor("q", q, dtype=FLOATS, shape=("T", "H", "nope + rope"))
    tokens, heads, width = q.shape
    check_tensor("w_uk", w_uk, dtype=q.dtype, shape=(heads, "nope", "latent"), like=q)
    _, nope, latent = w_uk.shape
    rope = width - nope
    if nope == 0 or latent == 0 or rope <= 0 or rope % 2:
        raise ValueError(
            f"w_uk: expected shape [H, nope, latent] of at least one latent column, that leaves a positive even number "
            f"of q's {width} columns to the rope part, got {list(w_uk.shape)}"
        )
    for name, x in (("cos", cos), ("sin", sin)):
        check_tensor(name, x, dtype=torch.float32, shape=(tokens, rope // 2), like=q)
    return _mla_decode_queries(q, w_uk, cos, sin, impl=impl)


# ---- registration ---------------------------------------------------------------------------------------------------


def _fake(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    tokens, heads, width = q.shape
    _, nope, latent = w_uk.shape
    return q.new_empty(tokens, heads, latent + width - nope)


_mla_decode_queries = Operation(
    "mla_decode_queries(Tensor q, Tensor w_uk, Tensor cos, Tensor sin) -> Tensor",
    reference=reference.mla_decode_queries,
    hopper="dskernels.mla.absorb.hopper:mla_decode_queries",
    triton="dskernels.mla.absorb.triton:mla_decode_queries",
    fake=_fake,
)
