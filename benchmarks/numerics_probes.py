"""What `numerics.py` calls: of each operation its inputs, the exact result, and torch's nearest equivalent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dskernels as ds
from benchmarks import exact
from dskernels import Fp8Tensor, Permuted, Routing

Make = Callable[..., Tensor]
NOT_FINITE = ("nan", "inf")
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Probe:
    """One operation.

    Attributes:
        name: of the operation, and of what is special about it.
        sizes: arguments of `inputs`.
        inputs: makes the arguments; the first tensor that it makes is of the kind of data that is looked at.
        exact: the results in fp64.
        run: calls the operation.
        peer: what people use in torch, in the same precision.
        without: kinds of data that say nothing here.
    """

    name: str
    sizes: Sequence[tuple[int, ...]]
    inputs: Callable[..., dict[str, Any]]
    exact: Callable[..., Sequence[Tensor]]
    run: Callable[..., Any]
    peer: Callable[..., Any] | None = None
    without: Sequence[str] = ()


def per_tensor(x: Tensor) -> Tensor:
    """e4m3 with one scale for all, and back."""
    scale = x.float().abs().amax() / 448
    return (x.float() / scale).clamp(-448, 448).to(E4M3).float() * scale


def _quantize(block: tuple[int, int]) -> Probe:
    return Probe(
        f"quantize {block[0]}x{block[1]}",
        [(33, 512), (256, 1000)],
        lambda make, rows, cols: {"x": make(rows, cols)},
        lambda x: [exact.exact(x)],
        lambda x, impl: ds.quantize(x, block, impl=impl),
        per_tensor,
        NOT_FINITE,
    )


def _swiglu() -> Probe:
    return Probe(
        "swiglu_quantize",
        [(33, 256), (130, 512), (1030, 256)],
        lambda make, rows, cols: {"gate_up": make(rows, 2 * cols)},
        lambda gate_up: [exact.swiglu(gate_up)],
        lambda gate_up, impl: ds.swiglu_quantize(gate_up, impl=impl),
        lambda gate_up: per_tensor(F.silu(gate_up.chunk(2, -1)[0]) * gate_up.chunk(2, -1)[1]),
        ("subnormal", *NOT_FINITE),  # whose products are zero in fp32
    )


def _rmsnorm() -> Probe:
    def want(x: Tensor, weight: Tensor) -> list[Tensor]:
        return [exact.rmsnorm(x, weight, 1e-6)]

    return Probe(
        "rmsnorm_quantize, its norm",
        [(33, 512), (7, 7168)],
        lambda make, rows, cols: {"x": make(rows, cols), "weight": make(cols)},
        want,
        lambda x, weight, impl: [ds.rmsnorm_quantize(x, weight, 1e-6, with_normed=True, impl=impl)[2]],
        lambda x, weight: [F.rms_norm(x, (x.shape[1],), weight, 1e-6)],
    )


def _rmsnorm_backward() -> Probe:
    def peer(dy: Tensor, x: Tensor, weight: Tensor) -> Sequence[Tensor]:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        return torch.autograd.grad(F.rms_norm(x, (x.shape[1],), weight, 1e-6), (x, weight), dy)

    return Probe(
        "rmsnorm_backward",
        [(33, 512), (130, 2048)],
        lambda make, rows, cols: {"dy": make(rows, cols), "x": make(rows, cols), "weight": make(cols)},
        lambda dy, x, weight: exact.rmsnorm_backward(dy, x, weight, 1e-6),
        lambda dy, x, weight, impl: ds.rmsnorm_backward(dy, x, weight, 1e-6, impl=impl),
        peer,
    )


def _fp8_gemm(rows: int) -> Probe:
    def inputs(make: Make, m: int, n: int, k: int) -> dict[str, Any]:
        a = ds.quantize(make(m, k), impl="reference")
        return {"a": a, "b": ds.quantize(make(n, k), (rows, 128), impl="reference")}

    def peer(a: Fp8Tensor, b: Fp8Tensor) -> Tensor:
        return a.dequantize(torch.bfloat16) @ b.dequantize(torch.bfloat16).T

    return Probe(
        f"fp8_gemm, B in {rows}x128",
        [(5, 130, 512), (130, 256, 2048)],
        inputs,
        lambda a, b: [exact.fp8_gemm(a, b)],
        lambda a, b, impl: ds.fp8_gemm(a, b, impl=impl),
        peer,
    )


def _linear() -> Probe:
    return Probe(
        "fp8_linear, of its master weight",
        [(33, 256, 512), (130, 256, 2048)],
        lambda make, m, n, k: {"x": make(m, k), "weight": make(n, k, scale=k**-0.5)},
        lambda x, weight: [exact.exact(x) @ exact.exact(weight).T],
        lambda x, weight, impl: ds.fp8_linear(x, weight, impl=impl),
        lambda x, weight: (per_tensor(x) @ per_tensor(weight).T).bfloat16(),
        NOT_FINITE,
    )


def _grouped(fp8: bool) -> Probe:
    def inputs(make: Make, rows: int, n: int, k: int) -> dict[str, Any]:
        offsets = torch.tensor([0, rows // 3, rows // 3, rows - 1], dtype=torch.int32)
        a, b = make(rows, k), make(3, n, k)
        if fp8:
            a, b = ds.quantize(a, impl="reference"), ds.quantize(b, (128, 128), impl="reference")  # type: ignore[assignment]
        return {"a": a, "b": b, "offsets": offsets}

    def peer(a: Any, b: Any, offsets: Tensor) -> Tensor:
        wide_a, wide_b = (x.dequantize(torch.bfloat16) if isinstance(x, Fp8Tensor) else x for x in (a, b))
        out = wide_a.new_zeros(a.shape[0], b.shape[1])
        for e, (start, end) in enumerate(exact.groups(offsets, a.shape[0])):
            out[start:end] = wide_a[start:end] @ wide_b[e].T
        return out

    return Probe(
        f"grouped_gemm, {'e4m3' if fp8 else 'bf16'}",
        [(40, 130, 512), (130, 256, 1024)],
        inputs,
        lambda a, b, offsets: [exact.grouped_gemm(a, b, offsets)],
        lambda a, b, offsets, impl: ds.grouped_gemm(a, b, offsets, impl=impl),
        peer,
    )


def _wgrad() -> Probe:
    def inputs(make: Make, rows: int, n: int, k: int) -> dict[str, Any]:
        offsets = torch.tensor([0, rows // 3, rows // 3, rows - 1], dtype=torch.int32)
        return {"dy": make(rows, n), "x": make(rows, k), "offsets": offsets}

    def peer(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
        spans = exact.groups(offsets, x.shape[0])
        return torch.stack([dy[start:end].T @ x[start:end] for start, end in spans])

    return Probe(
        "grouped_wgrad, bf16",
        [(40, 64, 128), (1000, 64, 128)],
        inputs,
        lambda dy, x, offsets: [exact.grouped_wgrad(dy, x, offsets)],
        lambda dy, x, offsets, impl: ds.grouped_wgrad(dy, x, offsets, impl=impl),
        peer,
    )


def _route(score: str) -> Probe:
    def run(logits: Tensor, impl: str) -> Tensor:
        routing = ds.route(logits, top_k=8, score=score, impl=impl)
        # As fp64 chooses them, so that the weights stand in one order.
        return torch.zeros_like(logits, dtype=torch.float32).scatter(1, routing.experts.long(), routing.weights)

    def want(logits: Tensor) -> list[Tensor]:
        experts = ds.route(logits, top_k=8, score=score, impl="reference").experts
        weights = exact.route_weights(logits, experts, score=score)
        return [torch.zeros(logits.shape, dtype=torch.float64).scatter(1, experts.long(), weights)]

    def peer(logits: Tensor) -> Tensor:
        s = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
        top, experts = s.topk(8, -1)
        return torch.zeros_like(s).scatter(1, experts, top / top.sum(-1, keepdim=True))

    return Probe(
        f"route, {score}",
        [(130, 256), (33, 64)],
        lambda make, rows, cols: {"logits": make(rows, cols, dtype=torch.float32)},
        want,
        run,
        peer,
        ("equal", "outlier", "subnormal", "range", *NOT_FINITE),  # ties, which torch.topk breaks as it likes
    )


def _balance() -> Probe:
    def inputs(make: Make, rows: int, cols: int) -> dict[str, Any]:
        lengths = torch.tensor([rows // 3, rows - rows // 3], dtype=torch.int32)
        return {"logits": make(rows, cols, dtype=torch.float32), "sequence_lengths": lengths}

    options: dict[str, Any] = {"top_k": 8, "alpha": 1.0}
    return Probe(
        "balance_loss",
        [(130, 256), (33, 64)],
        inputs,
        lambda **given: [exact.balance_loss(**given, **options)],
        lambda impl, **given: ds.balance_loss(**given, **options, impl=impl),
        without=("outlier", "range"),  # scores that tie in fp32 and not in fp64
    )


def _combine() -> Probe:
    def inputs(make: Make, rows: int, cols: int) -> dict[str, Any]:
        y, weights = make(rows * 8, cols), make(rows, 8, dtype=torch.float32)
        index = torch.randperm(rows * 8, generator=torch.Generator().manual_seed(rows)).int().view(rows, 8)
        return {"y": y, "index": index, "weights": weights}

    def run(y: Tensor, index: Tensor, weights: Tensor, impl: str) -> Tensor:
        offsets = torch.tensor([0, y.shape[0]], dtype=torch.int32, device=y.device)
        return ds.combine(y, Permuted(y, offsets, index), weights, impl=impl)

    return Probe(
        "combine",
        [(33, 256), (130, 512)],
        inputs,
        lambda y, index, weights: [exact.combine(y, index, weights)],
        run,
        lambda y, index, weights: (y[index.long()] * weights[..., None].to(y.dtype)).sum(1),
    )


def _experts() -> Probe:
    def inputs(make: Make, rows: int, hidden: int, inner: int) -> dict[str, Any]:
        x = make(rows, hidden)
        w13, w2 = make(4, 2 * inner, hidden, scale=hidden**-0.5), make(4, hidden, inner, scale=inner**-0.5)
        ids = torch.randint(0, 4, (rows, 2), generator=torch.Generator().manual_seed(rows), dtype=torch.int32)
        return {"x": x, "w13": w13, "w2": w2, "weights": make(rows, 2, dtype=torch.float32), "experts": ids}

    def run(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, experts: Tensor, impl: str) -> Tensor:
        return ds.fused_experts(x, w13, w2, Routing(weights, experts, experts, experts), impl=impl)

    def peer(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(4):
            token, choice = torch.where(experts == e)
            gate, up = F.linear(x[token], w13[e]).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, w2[e])
            out.index_add_(0, token, y * weights[token, choice, None].to(y.dtype))
        return out

    return Probe(
        "fused_experts, bf16",
        [(9, 256, 128), (33, 512, 256)],
        inputs,
        lambda x, w13, w2, weights, experts: [exact.fused_experts(x, w13, w2, weights, experts)],
        run,
        peer,
        ("subnormal",),
    )


def _rope() -> Probe:
    def inputs(make: Make, rows: int, heads: int) -> dict[str, Any]:
        x, angle = make(rows, heads, 64), make(rows, 32, dtype=torch.float32, scale=3.0)
        return {"x": x, "cos": angle.cos(), "sin": angle.sin()}

    def peer(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd, cos, sin = x[..., ::2], x[..., 1::2], cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    return Probe(
        "apply_rope",
        [(33, 4), (130, 16)],
        inputs,
        lambda x, cos, sin: [exact.rope(x, cos, sin)],
        lambda x, cos, sin, impl: ds.apply_rope(x, cos, sin, impl=impl),
        peer,
    )


def _decode() -> Probe:
    def inputs(make: Make, batch: int, heads: int, length: int) -> dict[str, Any]:
        pages = -(-length // 64)
        q, cache = make(batch, 1, heads, 576, scale=0.3), make(batch * pages, 64, 576, scale=0.3)
        table = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
        return {
            "q": q,
            "cache": cache,
            "block_table": table,
            "lengths": torch.full((batch,), length, dtype=torch.int32),
        }

    def peer(q: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor) -> Sequence[Tensor]:
        rows = cache[block_table.long()].flatten(1, 2)[:, : int(lengths[0])]
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), rows[:, None].expand(-1, q.shape[2], -1, -1),
            rows[:, None, :, :512].expand(-1, q.shape[2], -1, -1), scale=576**-0.5,
        )  # fmt: skip
        return [out.transpose(1, 2)]

    options = {"scale": 576**-0.5, "value_dim": 512}
    return Probe(
        "mla_decode",
        [(2, 16, 70), (1, 4, 300)],
        inputs,
        lambda **given: [exact.mla_decode(**given, **options)[0]],
        lambda impl, **given: [ds.mla_decode(**given, scale=576**-0.5, impl=impl)[0]],
        peer,
    )


def _prefill() -> Probe:
    def inputs(make: Make, tokens: int, heads: int) -> dict[str, Any]:
        cu = torch.tensor([0, tokens], dtype=torch.int32)
        q, k, v = make(tokens, heads, 192), make(tokens, heads, 192), make(tokens, heads, 128)
        return {"q": q, "k": k, "v": v, "cu_seqlens_q": cu, "cu_seqlens_k": cu}

    def peer(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Sequence[Tensor]:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=192**-0.5)[0].transpose(0, 1)]

    return Probe(
        "mla_prefill",
        [(70, 2), (200, 1)],
        inputs,
        lambda **given: [exact.mla_prefill(**given, scale=192**-0.5)[0]],
        lambda impl, **given: [ds.mla_prefill(**given, scale=192**-0.5, impl=impl)[0]],
        peer,
    )


def _merge() -> Probe:
    def inputs(make: Make, rows: int, heads: int) -> dict[str, Any]:
        out_a, out_b = make(rows, heads, 128), make(rows, heads, 128)
        lse_a, lse_b = (make(heads, rows, dtype=torch.float32, scale=5.0) for _ in range(2))
        return {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}

    def peer(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Sequence[Tensor]:
        lse = torch.logaddexp(lse_a, lse_b)
        w_a, w_b = ((x - lse).exp().T[..., None] for x in (lse_a, lse_b))
        return [(w_a * out_a + w_b * out_b).to(out_a.dtype), lse]

    return Probe(
        "merge_states",
        [(33, 4), (130, 16)],
        inputs,
        lambda **given: exact.merge_states(**given),
        lambda impl, **given: ds.merge_states(**given, impl=impl),
        peer,
    )


def _queries() -> Probe:
    def inputs(make: Make, rows: int, heads: int) -> dict[str, Any]:
        q, w_uk = make(rows, heads, 192), make(heads, 128, 512, scale=0.1)
        angle = make(rows, 32, dtype=torch.float32, scale=3.0)
        return {"q": q, "w_uk": w_uk, "cos": angle.cos(), "sin": angle.sin()}

    return Probe(
        "mla_decode_queries, latent part",
        [(5, 2), (33, 16)],
        inputs,
        lambda **given: [exact.mla_decode_queries(**given)[..., :512]],
        lambda impl, **given: [ds.mla_decode_queries(**given, impl=impl)[..., :512]],
        lambda q, w_uk, cos, sin: [torch.einsum("thn,hnl->thl", q[..., :128], w_uk)],
    )


def _cache(fp8: bool) -> Probe:
    def inputs(make: Make, rows: int) -> dict[str, Any]:
        kv, k_rope, weight = make(rows, 512), make(rows, 64), make(512)
        angle = make(rows, 32, dtype=torch.float32, scale=3.0)
        return {"kv": kv, "k_rope": k_rope, "norm_weight": weight, "cos": angle.cos(), "sin": angle.sin()}

    def run(kv: Tensor, impl: str, **given: Tensor) -> Tensor:
        dtype, width = (torch.uint8, 656) if fp8 else (torch.bfloat16, 576)
        cache = torch.zeros(1, kv.shape[0], width, dtype=dtype, device=kv.device)
        slots = torch.arange(kv.shape[0], device=kv.device)
        ds.write_latent_cache(kv, **given, cache=cache, slots=slots, eps=1e-6, impl=impl)
        rows = [exact.cached_rows(cache.cpu(), [0], kv.shape[0], 512)]
        return rows[0]

    return Probe(
        f"write_latent_cache, {'e4m3' if fp8 else 'bf16'}",
        [(5,), (33,)],
        inputs,
        lambda **given: [exact.latent_rows(**given, eps=1e-6)],
        run,
        without=NOT_FINITE if fp8 else (),
    )


def _cross_entropy() -> Probe:
    def inputs(make: Make, rows: int, cols: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(rows)
        return {"logits": make(rows, cols, scale=3.0), "targets": torch.randint(0, cols, (rows,), generator=generator)}

    return Probe(
        "cross_entropy",
        [(33, 1000), (5, 32000)],
        inputs,
        lambda logits, targets: [exact.cross_entropy(logits, targets)],
        lambda logits, targets, impl: ds.cross_entropy(logits, targets, impl=impl),
        lambda logits, targets: F.cross_entropy(logits, targets, reduction="none"),
    )


PROBES = (
    _quantize((1, 128)),
    _quantize((128, 128)),
    _quantize((128, 1)),
    _swiglu(),
    _rmsnorm(),
    _rmsnorm_backward(),
    _fp8_gemm(128),
    _fp8_gemm(1),
    _linear(),
    _grouped(True),
    _grouped(False),
    _wgrad(),
    _route("sigmoid"),
    _route("softmax"),
    _balance(),
    _combine(),
    _experts(),
    _rope(),
    _cache(False),
    _cache(True),
    _queries(),
    _decode(),
    _prefill(),
    _merge(),
    _cross_entropy(),
)
