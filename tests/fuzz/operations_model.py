"""Valid calls of routing, the expert block and attention."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import exact
from dskernels.reference import moe as by_reference
from dskernels.reference.fp8 import quantize
from dskernels.reference.mla import pack_fp8
from dskernels.types import Fp8Tensor, Routing
from fuzz import allowing
from fuzz.drawing import FLOATS, Call, Draw

TOKENS = (3, 1, 0, 17)


def grid(d: Draw, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits that tie exactly or differ by more than rounding: what is chosen is then the same everywhere."""
    x = d.one(torch.randint, torch.randint)(-64, 65, shape, generator=d.random) / 16
    if d.chance(4) and x.numel():
        x.view(-1)[:: d.one(7, 3, 2)] = d.one(float("nan"), float("inf"), float("-inf"))
    return d.laid_out(x.to(dtype))


def _choice(d: Draw, arguments: dict, width: int) -> None:
    groups = d.one(*(n for n in (1, 2, 4) if width % n == 0))
    top_groups = d.one(*range(1, groups + 1))
    arguments |= {
        "bias": d.laid_out(torch.randint(-8, 9, (width,), generator=d.random) / 64) if d.chance() else None,
        "top_k": d.one(*range(1, min(top_groups * (width // groups), 8) + 1)),
        "n_groups": groups,
        "top_groups": top_groups,
        "score": d.one("sigmoid", "softmax"),
        "normalize": d.chance(),
        "scale": d.one(1.0, 2.5, 0),
    }
    if d.chance(3):
        arguments["physical"] = torch.randint(
            -1, 2 * width, (width, d.one(1, 3)), generator=d.random, dtype=torch.int32
        )


def route(d: Draw) -> Call:
    width = d.models_or(d.one(256, 64), d.one(8, 1, 2, 16, 12))
    arguments = {"logits": grid(d, d.one(*TOKENS), width, dtype=d.one(*FLOATS))}
    _choice(d, arguments, width)

    def want(logits, score, normalize, scale, result, physical=None, bias=None, **_):
        if physical is not None or (bias is not None and bool(bias.isnan().any())):
            return [None] * 4
        weights = exact.route_weights(logits, result.experts, score=score, normalize=bool(normalize), scale=scale)
        return [weights, None, None, None]

    return Call("route", arguments, want, loose=4.0)


def route_hidden(d: Draw) -> Call:
    width, hidden = d.models_or((256, 1024), (d.one(8, 1, 16), d.one(16, 1, 40)))
    shapes = {"x": (d.one(*TOKENS), hidden), "weight": (width, hidden)}
    if width == 256:  # so many are seldom apart by more than rounding: logits that are exact in any order
        values = {k: torch.randint(-2, 3, shape, generator=d.random) / 8 for k, shape in shapes.items()}
        arguments = {k: d.laid_out(x.to(d.one(*FLOATS))) for k, x in values.items()}
    else:
        arguments = {k: d.floats(*shape, dtype=d.one(*FLOATS), kind="normal", scale=0.5) for k, shape in shapes.items()}
    _choice(d, arguments, width)

    def want(x, weight, **_):
        return [None] * 4 + [exact.exact(x) @ exact.exact(weight).T]

    return Call("route_hidden", arguments, want, loose=4.0)


def update_bias(d: Draw) -> Call:
    width = d.one(8, 1, 0, 300)
    arguments = {
        "bias": d.floats(width),
        "load": d.integers(width, low=0, high=1000, dtype=d.one(torch.int32, torch.int64)),
        "rate": d.one(0.001, 0, 1.0),
    }

    def want(bias, load, rate):
        counts = load.tolist()
        lack = [_wrapped(sum(counts) - len(counts) * n) for n in counts]
        return [exact.exact(bias) + rate * torch.tensor(lack).double().sign()]

    return Call("update_bias", arguments, want, writes=("bias",))


def _wrapped(n: int) -> int:
    """As 64 bits hold it."""
    return (n + 2**63) % 2**64 - 2**63


def balance_loss(d: Draw) -> Call:
    width, tokens = d.one(8, 1, 12), d.one(*TOKENS)
    arguments = {
        "logits": grid(d, tokens, width, dtype=d.one(*FLOATS)),
        "top_k": d.one(*range(1, min(width, 4) + 1)),
        "alpha": d.one(1.0, 1e-4, 0),
        "sequence_lengths": d.integers(d.one(2, 1, 0, 5), low=-1, high=tokens + 2),
        "score": d.one("sigmoid", "softmax"),
    }
    return Call("balance_loss", arguments, lambda **given: [exact.balance_loss(**given)], loose=4.0)


def load_statistics(d: Draw) -> Call:
    shape = (*d.one((), (3,), (2, 2), (0,)), d.one(8, 1, 300))
    return Call("load_statistics", {"load": d.integers(*shape, low=0, high=d.one(1000, 1))})


def _experts(d: Draw, tokens: int, n: int, hostile: bool = True) -> Tensor:
    low, high = (-2, n + 2) if hostile and d.chance() else (0, n)
    return d.integers(tokens, d.one(2, 1, 0, 5), low=low, high=high, dtype=d.one(torch.int32, torch.int64))


def permute(d: Draw) -> Call:
    tokens, n = d.one(*TOKENS), d.one(4, 1, 60)
    arguments = {
        "x": d.floats(tokens, d.one(16, 1, 0, 130), dtype=d.one(*FLOATS)),
        "experts": _experts(d, tokens, n),
        "n_experts": n,
    }
    return Call("permute", arguments, lambda **given: list(exact.permute(**given)), bits=True)


def combine(d: Draw) -> Call:
    tokens, n = d.one(*TOKENS), d.one(4, 1)
    experts, hidden = _experts(d, tokens, n), d.one(16, 1, 0, 130)
    permuted = by_reference.permute(d.floats(tokens, hidden), experts, n)
    if d.chance(3):
        permuted = permuted._replace(index=d.integers(*experts.shape, low=-3, high=tokens * experts.shape[1] + 3))
    arguments = {
        "y": d.floats(tokens * experts.shape[1], hidden, dtype=d.one(*FLOATS), kind="normal"),
        "permuted": permuted,
        "weights": d.floats(*experts.shape, kind="normal"),
    }

    def want(y, permuted, weights):
        return [exact.combine(y, permuted.index, weights)]

    return Call("combine", arguments, want, loose=4.0)


def fused_experts(d: Draw) -> Call:
    n, (hidden, inner) = d.one(4, 1), d.models_or((656, 400), (d.one(16, 1, 130), d.one(16, 1, 130)))
    tokens = d.models_or(d.one(3, 150), d.one(3, 1, 0, 9))
    dtype, fp8 = d.one(*FLOATS), d.chance()
    of_weights = d.one(*FLOATS) if fp8 else dtype
    n_shared = d.one(0, 1) if n > 1 else 0

    def network(*lead: int) -> tuple:
        up = d.floats(*lead, 2 * inner, hidden, dtype=of_weights, kind="normal", scale=0.2)
        down = d.floats(*lead, hidden, inner, dtype=of_weights, kind="normal", scale=0.2)
        if fp8 and d.chance():
            return tuple(
                Fp8Tensor(*(t.contiguous() for t in quantize(w.float(), (128, 128))[:2]), (128, 128))
                for w in (up, down)
            )
        return up, down

    w13, w2 = network(n)
    x = d.floats(tokens, hidden, dtype=dtype, kind="normal")
    experts = _experts(d, tokens, n - n_shared)
    weights = d.floats(*experts.shape, kind="normal")
    empty = torch.zeros(1, dtype=torch.int32)
    arguments = {
        "x": x,
        "w13": w13,
        "w2": w2,
        "routing": Routing(weights, experts, empty, empty),
        "shared": network() if not n_shared and d.chance() else None,
        "n_shared": n_shared,
        "quantized": d.fp8(x, (1, 128)) if d.chance() else None,
        "fp8": fp8,
        "recompute": d.one(None, True, False),
    }

    def want(x, w13, w2, routing, shared, n_shared, fp8, **_):
        if fp8 or any(isinstance(w, Fp8Tensor) for w in (w13, w2, *(shared or ()))):
            return [None]
        return [exact.fused_experts(x, w13, w2, routing.weights, routing.experts, shared, n_shared)]

    return Call("fused_experts", arguments, want, loose=2.0 if fp8 else 32.0, apart=allowing.fused_experts)


def feed_forward(d: Draw) -> Call:
    hidden, inner = d.models_or((656, 400), (d.one(16, 1, 130), d.one(16, 1, 130)))
    tokens, dtype, fp8 = d.models_or(150, d.one(3, 1, 0, 9)), d.one(*FLOATS), d.chance()
    up, down = (
        d.floats(*shape, dtype=d.one(*FLOATS) if fp8 else dtype, kind="normal", scale=0.2)
        for shape in ((2 * inner, hidden), (hidden, inner))
    )
    if fp8 and d.chance():
        up, down = (d.fp8(weight, (128, 128)) for weight in (up, down))
    x = d.floats(tokens, hidden, dtype=dtype, kind="normal")
    arguments = {
        "x": x,
        "w13": up,
        "w2": down,
        "quantized": d.fp8(x, (1, 128)) if d.chance() else None,
        "fp8": fp8,
        "recompute": d.one(None, True, False),
    }

    def want(x, w13, w2, fp8, **_):
        if fp8 or isinstance(w13, Fp8Tensor) or isinstance(w2, Fp8Tensor):
            return [None]
        return [exact.expert(exact.exact(x), exact.exact(w13), exact.exact(w2))]

    return Call("feed_forward", arguments, want, loose=2.0 if fp8 else 32.0, apart=allowing.feed_forward)


def cross_entropy(d: Draw) -> Call:
    tokens, width = d.one(*TOKENS), d.one(8, 1, 130)
    arguments = {
        "logits": d.floats(tokens, width, dtype=d.one(*FLOATS), kind="normal", scale=3.0),
        "targets": d.integers(tokens, low=-2 if d.chance(3) else 0, high=width, dtype=d.one(torch.int64, torch.int32)),
    }
    return Call("cross_entropy", arguments, lambda **given: [exact.cross_entropy(**given)], loose=4.0)


def _angles(d: Draw, tokens: int, half: int) -> dict[str, Tensor]:
    angle = torch.rand(tokens, half, generator=d.random) * 6
    return {"cos": d.laid_out(angle.cos()), "sin": d.laid_out(angle.sin())}


def _latents(d: Draw, pages: int, page: int, latent: int, rope: int, dtype: torch.dtype) -> Tensor:
    rows = d.floats(pages, page, latent + rope, kind="normal")
    if dtype != torch.uint8:
        return d.laid_out(rows.to(dtype), pad=False)
    flat = rows.reshape(-1, latent + rope)
    packed = pack_fp8(flat[:, :latent], flat[:, latent:])
    return packed.reshape(pages, page, packed.shape[1])


def write_latent_cache(d: Draw) -> Call:
    tokens, latent, rope = d.one(*TOKENS), d.one(16, 128, 132, 4), d.one(4, 2, 64)
    if d.models:
        latent, rope = 512, 64
    pages, page, dtype = d.one(4, 1, 20), d.one(2, 1, 16), d.one(*FLOATS)
    slots = torch.randperm(max(pages * page, tokens) + 8, generator=d.random)[:tokens] - 4  # some of them outside
    arguments = {
        "kv": d.floats(tokens, latent, dtype=dtype),
        "k_rope": d.floats(tokens, rope, dtype=dtype, kind="normal"),
        "norm_weight": d.floats(latent, dtype=d.one(*FLOATS)),
        **_angles(d, tokens, rope // 2),
        "cache": _latents(d, pages, page, latent, rope, d.one(*FLOATS, torch.uint8)),
        "slots": d.laid_out(slots),
        "eps": d.one(1e-6, 1e-2),
    }

    def want(kv, k_rope, norm_weight, cos, sin, cache, slots, eps):
        if cache.dtype == torch.uint8:
            return [None]
        expected, rows = exact.exact(cache), exact.latent_rows(kv, k_rope, norm_weight, cos, sin, eps)
        for row, slot in zip(rows, slots.tolist(), strict=True):
            if 0 <= slot < cache.shape[0] * cache.shape[1]:
                expected[slot // cache.shape[1], slot % cache.shape[1]] = row
        return [expected]

    return Call("write_latent_cache", arguments, want, writes=("cache",), loose=2.0)


def _paged(d: Draw, batch: int, latent: int, rope: int, dtype: torch.dtype) -> dict[str, Tensor]:
    pages, page, entries = d.one(5, 1), d.one(*((64, 1, 16) if d.models else (4, 1, 16))), d.one(3, 1, 0)
    low, high = (-3, pages + 3) if d.chance(3) else (0, pages)
    return {
        "cache": _latents(d, pages, page, latent, rope, d.one(dtype, torch.uint8)),
        "block_table": d.integers(batch, entries, low=low, high=high),
        "lengths": d.integers(batch, low=-1 if d.chance(3) else 0, high=entries * page + 2),
    }


def mla_decode(d: Draw) -> Call:
    batch, queries, heads = d.one(2, 1, 0), d.one(1, 2, 3), d.one(2, 1, 0, 17)
    latent, rope, dtype = d.one(32, 16, 128, 20), d.one(16, 64, 8), d.one(*FLOATS)
    if d.models:
        heads, latent, rope = d.one(16, 2, 64, 128), 512, 64
    arguments = {
        "q": d.floats(batch, queries, heads, latent + rope, dtype=dtype, kind="normal"),
        **_paged(d, batch, latent, rope, dtype),
        "scale": d.one(0.2, 1.0, 0),
        "value_dim": latent,
        "q_lengths": d.integers(batch, low=-1, high=queries + 2) if d.chance() else None,
    }
    loose = 4.0 if arguments["cache"].dtype == torch.uint8 else 8.0  # and what allowing.py derives

    def want(**given):
        return list(exact.mla_decode(**given))

    return Call("mla_decode", arguments, want, loose=loose, apart=allowing.mla_decode)


def mla_decode_queries(d: Draw) -> Call:
    tokens, heads, nope, rope = d.one(*TOKENS), d.one(2, 1, 0, 5), d.one(16, 1, 128), d.one(4, 2, 64)
    dtype, latent = d.one(*FLOATS), d.one(16, 1, 130)
    if d.models:
        heads, nope, rope, latent = d.one(2, 16), 128, 64, 512
    arguments = {
        "q": d.floats(tokens, heads, nope + rope, dtype=dtype),
        "w_uk": d.floats(heads, nope, latent, dtype=dtype, kind="normal"),
        **_angles(d, tokens, rope // 2),
    }
    return Call("mla_decode_queries", arguments, lambda **given: [exact.mla_decode_queries(**given)], loose=8.0)


def mla_values_quantize(d: Draw) -> Call:
    tokens, heads, latent, dtype = d.one(*TOKENS), d.one(2, 1, 0, 5), d.one(16, 1, 130), d.one(*FLOATS)
    arguments = {
        "latents": d.floats(tokens, heads, latent, dtype=dtype),
        "w_uv": d.floats(heads, d.one(128, 0, 256), latent, dtype=dtype, kind="normal"),
    }
    return Call("mla_values_quantize", arguments, lambda **given: [exact.mla_values(**given)])


def mla_prefill(d: Draw) -> Call:
    tokens, keys, heads_k = d.one(*TOKENS), d.one(*TOKENS), d.one(1, 2)
    heads, own, rope, value = heads_k * d.one(1, 2, 0), d.one(16, 1, 20), d.one(0, 4, 16), d.one(16, 1, 20)
    dtype, sequences = d.one(*FLOATS), d.one(1, 2, 0)
    if d.models:
        tokens, keys, own, rope, value = d.one(*TOKENS, 300), d.one(*TOKENS, 400), 128, 64, 128
    arguments = {
        "q": d.floats(tokens, heads, own + rope, dtype=dtype, kind="normal"),
        "k": d.floats(keys, heads_k, own, dtype=dtype),
        "v": d.floats(keys, heads_k, value, dtype=dtype),
        "cu_seqlens_q": d.vector(d.bounds(sequences, tokens)),
        "cu_seqlens_k": d.vector(d.bounds(sequences, keys)),
        "scale": d.one(0.2, 1.0, 0),
        "causal": d.chance(),
        "k_rope": d.floats(keys, rope, dtype=dtype, kind="normal") if rope else None,
    }
    return Call("mla_prefill", arguments, lambda **given: list(exact.mla_prefill(**given)), loose=8.0)


def mla_prefill_cached(d: Draw) -> Call:
    tokens, heads, batch, dtype = d.one(*TOKENS), d.one(2, 1), d.one(2, 1, 0), d.one(*FLOATS)
    latent, nope, rope, value = d.one(16, 128, 20), d.one(16, 1), d.one(4, 2, 16), d.one(16, 1, 20)
    if d.models:
        heads, latent, nope, rope, value = d.one(2, 16), 512, 128, 64, 128
    cu = d.bounds(batch, tokens)
    arguments = {
        "q": d.floats(tokens, heads, nope + rope, dtype=dtype, kind="normal"),
        "kv_b": d.floats(heads * (nope + value), latent, dtype=dtype, kind="normal", scale=0.3),
        **_paged(d, batch, latent, rope, dtype),
        "cu_seqlens_q": d.vector(cu),
        "scale": d.one(0.2, 1.0, 0),
    }

    def want(**given):
        if given["cu_seqlens_q"].shape[0] < 2 or int(given["cu_seqlens_q"][-1]) != given["q"].shape[0]:
            return [None, None]  # rows of no request
        row, latent = given["cache"].shape[2], given["kv_b"].shape[1]
        rope = (row - latent - 4 * -(-latent // 128)) // 2 if given["cache"].dtype == torch.uint8 else row - latent
        own = given["q"].shape[2] - rope
        return list(exact.mla_prefill_cached(**given, value_dim=given["kv_b"].shape[0] // given["q"].shape[1] - own))

    return Call("mla_prefill_cached", arguments, want, loose=4.0, apart=allowing.mla_prefill_cached)


def merge_states(d: Draw) -> Call:
    lead, heads, width, dtype = d.one((3,), (2, 3), (0,), (17,)), d.one(2, 1, 0), d.one(16, 1, 130), d.one(*FLOATS)
    shape, of_lse = (*lead, heads, width), (*lead[:-1], heads, lead[-1])

    def lse() -> Tensor:
        x = torch.randn(of_lse, generator=d.random) * 5
        if d.chance(3) and x.numel():
            x.view(-1)[:: d.one(2, 3)] = d.one(float("-inf"), float("inf"))
        return d.laid_out(x)

    out_a, out_b = (d.floats(*shape, dtype=dtype, kind="normal") for _ in range(2))
    arguments = {"out_a": out_a, "lse_a": lse(), "out_b": out_b, "lse_b": lse()}
    return Call("merge_states", arguments, lambda **given: list(exact.merge_states(**given)), loose=4.0)


def apply_rope(d: Draw) -> Call:
    tokens, heads, rope, dtype = d.one(*TOKENS), d.one(2, 1, 0), d.one(4, 2, 64), d.one(*FLOATS)
    x = d.floats(tokens, heads, rope, dtype=dtype)
    arguments = {"x": x, **_angles(d, tokens, rope // 2)}
    arguments["out"] = d.one(None, x, d.floats(tokens, heads, rope, dtype=dtype))
    writes = ("x", "out") if arguments["out"] is x else ("out",)
    return Call("apply_rope", arguments, lambda x, cos, sin, out: [exact.rope(x, cos, sin)], writes=writes, loose=2.0)


CALLS = {
    "route": route,
    "route_hidden": route_hidden,
    "update_bias": update_bias,
    "balance_loss": balance_loss,
    "load_statistics": load_statistics,
    "permute": permute,
    "combine": combine,
    "fused_experts": fused_experts,
    "feed_forward": feed_forward,
    "cross_entropy": cross_entropy,
    "write_latent_cache": write_latent_cache,
    "mla_decode": mla_decode,
    "mla_decode_queries": mla_decode_queries,
    "mla_values_quantize": mla_values_quantize,
    "mla_prefill": mla_prefill,
    "mla_prefill_cached": mla_prefill_cached,
    "merge_states": merge_states,
    "apply_rope": apply_rope,
}
