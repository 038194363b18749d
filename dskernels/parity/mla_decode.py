"""Parity cases of the latent cache, of decode over it, and of merging."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dskernels.parity import Case
from dskernels.parity.inputs import normal
from dskernels.parity.paging import paged_cache

# Half an ulp of bf16 is 2^-9, and half its square 2e-6; the softmax weights are rounded to bf16 as well.
BF16 = 5e-6
FP8 = 1e-5  # the unpacked keys and values are rounded to bf16 as well
FP32 = 1e-10


def _decode(
    heads: int,
    q_tokens: int,
    lengths: Sequence[int],
    page_size: int,
    dims: tuple[int, int] = (512, 64),
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    q_lengths: Sequence[int] | None = None,
):
    def inputs(device: torch.device) -> tuple[tuple, dict]:
        value, rope = dims
        q = normal(0, len(lengths), q_tokens, heads, value + rope, dtype=dtype).to(device)
        cache = paged_cache(1, lengths, page_size, value, rope, cache_dtype or dtype, device)
        new = None if q_lengths is None else torch.tensor(q_lengths, dtype=torch.int32, device=device)
        return (q, *cache), {"scale": (value + rope) ** -0.5, "value_dim": value, "q_lengths": new}

    return inputs


def _write(tokens: int, dims: tuple[int, int], cache_dtype: torch.dtype, exact: bool = False):
    """Inputs to write. `exact` ones have one result whatever the order of summation: rows of +-1, rotated by quarter
    turns."""

    def inputs(device: torch.device) -> tuple[tuple, dict]:
        latent, rope = dims
        kv, k_rope = normal(0, tokens, latent), normal(1, tokens, rope)
        angle = normal(2, tokens, rope // 2, scale=10.0)
        cos, sin = angle.cos(), angle.sin()
        if exact:
            kv = torch.where(kv < 0, -1.0, 1.0)
            cos, sin = (angle.round().remainder(2), 1 - angle.round().remainder(2))
        width = latent + 4 * -(-latent // 128) + 2 * rope if cache_dtype == torch.uint8 else latent + rope
        cache = torch.zeros(tokens, 3, width, dtype=cache_dtype)
        slots = torch.randperm(3 * tokens, generator=torch.Generator().manual_seed(3))[:tokens]
        slots[1], slots[2] = -1, 3 * tokens  # skipped
        kv, k_rope = kv.bfloat16(), k_rope.bfloat16()
        args = (kv, k_rope, normal(4, latent).bfloat16(), cos, sin, cache, slots)
        return tuple(arg.to(device) for arg in args), {"eps": 1e-12 if exact else 1e-6}

    return inputs


def _queries(tokens: int, heads: int, dims: tuple[int, int, int], dtype: torch.dtype):
    def inputs(device: torch.device) -> tuple[tuple, dict]:
        nope, rope, latent = dims
        angle = normal(2, tokens, rope // 2, scale=10.0)
        w_uk = normal(1, heads, nope, latent, dtype=dtype, scale=nope**-0.5)
        args = (normal(0, tokens, heads, nope + rope, dtype=dtype), w_uk, angle.cos(), angle.sin())
        return tuple(arg.to(device) for arg in args), {}

    return inputs


def _merge(shape: tuple[int, ...], dtype: torch.dtype):
    def inputs(device: torch.device) -> tuple[tuple, dict]:
        *batch, queries, heads, _ = shape
        lse = [normal(seed, *batch, heads, queries, scale=5.0) for seed in (2, 3)]
        for x, empty in zip(lse, ([0, 1], [1, 2]), strict=True):
            x.view(-1)[empty] = torch.tensor([-math.inf, math.inf])
        out = [normal(seed, *shape, dtype=dtype) for seed in (0, 1)]
        return tuple(x.to(device) for x in (out[0], lse[0], out[1], lse[1])), {}

    return inputs


CASES = [
    Case("mla_decode", "b3 q1 h16, page 64", _decode(16, 1, [140, 0, 20], 64), BF16),
    Case("mla_decode", "b2 q2 h9, page 1, padded", _decode(9, 2, [37, 70], 1, q_lengths=[1, 2]), BF16),
    Case("mla_decode", "b2 q1 h16, page 32, fp8 cache", _decode(16, 1, [70, 33], 32, cache_dtype=torch.uint8), FP8),
    Case("mla_decode", "b2 q4 h3, dims 32 + 16, fp32", _decode(3, 4, [300, 2], 5, (32, 16), torch.float32), FP32),
    Case("write_latent_cache", "t9, bf16 cache", _write(9, (512, 64), torch.bfloat16), BF16),
    Case("write_latent_cache", "t9, fp8 cache", _write(9, (512, 64), torch.uint8, exact=True), 0.0),
    Case("write_latent_cache", "t5, dims 48 + 16, fp32 cache", _write(5, (48, 16), torch.float32), FP32),
    Case("mla_decode_queries", "t9 h3", _queries(9, 3, (128, 64, 512), torch.bfloat16), BF16),
    Case("mla_decode_queries", "t17 h2, dims 24 + 6 to 40, fp32", _queries(17, 2, (24, 6, 40), torch.float32), FP32),
    Case("merge_states", "t7 h3, gradients", _merge((7, 3, 128), torch.float32), FP32, gradient=True),
    Case("merge_states", "b2 q3 h5, bf16, gradients", _merge((2, 3, 5, 512), torch.bfloat16), BF16, gradient=True),
]
