"""Parity cases of prefill, with expanded keys and values and over the latent cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dskernels.parity import Case
from dskernels.parity.inputs import normal
from dskernels.parity.paging import paged_cache

# Half an ulp of bf16 is 2^-9, and half its square 2e-6. The softmax weights are rounded to bf16 as well, in a gradient
# also those of the scores, and over a cache also the expanded keys and values.
BF16 = 5e-6
BF16_TWICE = 2e-5
FP32 = 1e-10


def _offsets(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def _prefill(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    heads: tuple[int, int],
    dims: tuple[int, int, int] = (128, 64, 128),
    dtype: torch.dtype = torch.bfloat16,
    shared_rope: bool = True,
    causal: bool = True,
):
    """Inputs with `heads` for queries and for keys; `dims` without rope, with rope, and of the value."""

    def inputs(device: torch.device) -> tuple[tuple, dict]:
        nope, rope, value = dims
        tokens_q, tokens_k = sum(lengths_q), sum(lengths_k)
        q = normal(0, tokens_q, heads[0], nope + rope, dtype=dtype)
        k = normal(1, tokens_k, heads[1], nope if shared_rope else nope + rope, dtype=dtype)
        v = normal(2, tokens_k, heads[1], value, dtype=dtype)
        kwargs = {"scale": (nope + rope) ** -0.5, "causal": causal}
        if shared_rope:
            kwargs["k_rope"] = normal(3, tokens_k, rope, dtype=dtype).to(device)
        cu_seqlens = (_offsets(lengths, device) for lengths in (lengths_q, lengths_k))
        return (*(x.to(device) for x in (q, k, v)), *cu_seqlens), kwargs

    return inputs


def _cached(
    lengths: Sequence[int],
    new: Sequence[int],
    page_size: int,
    heads: int = 2,
    dims: tuple[int, int, int, int] = (512, 128, 64, 128),
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
):
    """Inputs with `dims` of the latent, without rope, with rope, and of the value."""

    def inputs(device: torch.device) -> tuple[tuple, dict]:
        latent, nope, rope, value = dims
        q = normal(0, sum(new), heads, nope + rope, dtype=dtype).to(device)
        kv_b = normal(1, heads * (nope + value), latent, dtype=dtype, scale=latent**-0.5).to(device)
        cache = paged_cache(2, lengths, page_size, latent, rope, cache_dtype or dtype, device)
        return (q, kv_b, *cache, _offsets(new, device)), {"scale": (nope + rope) ** -0.5}

    return inputs


CASES = [
    Case(
        "mla_prefill",
        "113, 0 and 17 tokens, h2, shared rope, gradients",
        _prefill((113, 0, 17), (113, 0, 17), (2, 2)),
        BF16_TWICE,
        gradient=True,
    ),
    Case(
        "mla_prefill",
        "1 and 40 over 70 and 40, h4 of 2, gradients",
        _prefill((1, 40), (70, 40), (4, 2), (96, 64, 80), shared_rope=False),
        BF16_TWICE,
        gradient=True,
    ),
    Case(
        "mla_prefill",
        "20 and 9 over 7 and 50, h3 of 1, dims 32 + 16 / 24, fp32, gradients",
        _prefill((20, 9), (7, 50), (3, 1), (32, 16, 24), torch.float32),
        FP32,
        gradient=True,
    ),
    Case("mla_prefill", "30 over 70, not causal", _prefill((30,), (70,), (2, 1), causal=False), BF16),
    Case(
        "mla_prefill_cached",
        "5, 20 and 0 new of 70, 20 and 3, page 16",
        _cached((70, 20, 3), (5, 20, 0), 16),
        BF16_TWICE,
    ),
    Case(
        "mla_prefill_cached",
        "1 and 30 new of 64 and 10, page 64, fp8 cache",
        _cached((64, 10), (1, 30), 64, cache_dtype=torch.uint8),
        BF16_TWICE,
    ),
    Case(
        "mla_prefill_cached",
        "9 and 4 new of 40 and 0, page 1, dims 32, 24 + 16 / 40, fp32",
        _cached((40, 0), (9, 4), 1, 3, (32, 24, 16, 40), torch.float32),
        FP32,
    ),
]
