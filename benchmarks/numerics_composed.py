"""More of what `numerics.py` calls: networks, attention over what is cached, products that quantise, and gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dskernels as ds
from benchmarks import exact
from benchmarks.numerics_probes import NOT_FINITE, Make, Probe, per_tensor
from dskernels import Routing

SCALE = 192**-0.5


def _network(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """The expert block in the dtype of its arguments, one expert after the other."""
    out = torch.zeros_like(x)
    for e in range(w13.shape[0]):
        token, choice = torch.where(experts == e)
        gate, up = F.linear(x[token], w13[e]).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, w2[e])
        out = out.index_add(0, token, y * weights[token, choice, None].to(y.dtype))
    return out


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one sequence, [T, H, D]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)[0].transpose(0, 1)


def _network_inputs(make: Make, rows: int, hidden: int, inner: int) -> dict[str, Any]:
    x = make(rows, hidden)
    w13, w2 = make(4, 2 * inner, hidden, scale=hidden**-0.5), make(4, hidden, inner, scale=inner**-0.5)
    ids = torch.randint(0, 4, (rows, 2), generator=torch.Generator().manual_seed(rows), dtype=torch.int32)
    return {"x": x, "w13": w13, "w2": w2, "weights": make(rows, 2, dtype=torch.float32), "experts": ids}


def _leaves(*tensors: Tensor, wide: bool = False) -> list[Tensor]:
    """Copies of which gradients are asked for, `wide` in fp64."""
    return [(exact.exact(x) if wide else x.detach().clone()).requires_grad_() for x in tensors]


def _both() -> Probe:
    return Probe(
        "quantize_both",
        [(33, 512), (256, 1000)],
        lambda make, rows, cols: {"x": make(rows, cols)},
        lambda x: [exact.exact(x), exact.exact(x).T],
        lambda x, impl: ds.quantize_both(x, impl=impl),
        lambda x: [per_tensor(x), per_tensor(x).T],
        NOT_FINITE,
    )


def _swiglu_backward() -> Probe:
    def want(dy: Tensor, gate_up: Tensor) -> list[Tensor]:
        gradient = exact.swiglu_gradient(dy, gate_up)
        return [gradient, gradient.T]

    def peer(dy: Tensor, gate_up: Tensor) -> list[Tensor]:
        (gate_up,) = _leaves(gate_up)
        gate, up = gate_up.chunk(2, -1)
        gradient = per_tensor(torch.autograd.grad(F.silu(gate) * up, gate_up, dy)[0])
        return [gradient, gradient.T]

    return Probe(
        "swiglu_quantize_backward",
        [(33, 256), (130, 512), (1030, 256)],
        lambda make, rows, cols: {"dy": make(rows, cols), "gate_up": make(rows, 2 * cols)},
        want,
        lambda dy, gate_up, impl: ds.swiglu_quantize_backward(dy, gate_up, impl=impl),
        peer,
        ("subnormal", *NOT_FINITE),
    )


def _masked() -> Probe:
    def inputs(make: Make, rows: int, n: int, k: int) -> dict[str, Any]:
        return {"a": make(3, rows, k), "b": make(3, n, k), "counts": torch.tensor([rows, 0, rows // 2]).int()}

    def counted(out: Tensor, counts: Tensor) -> list[Tensor]:
        return [out[e, :count] for e, count in enumerate(counts.tolist()) if count]

    return Probe(
        "grouped_gemm_masked, bf16",
        [(24, 130, 512), (64, 256, 1024)],
        inputs,
        lambda a, b, counts: counted(exact.grouped_gemm_masked(a, b, counts), counts),
        lambda a, b, counts, impl: counted(ds.grouped_gemm_masked(a, b, counts, impl=impl), counts),
        lambda a, b, counts: counted(a @ b.mT, counts),
    )


def _route_hidden() -> Probe:
    return Probe(
        "route_hidden, its logits",
        [(33, 512, 64), (5, 7168, 256)],
        lambda make, rows, cols, n: {"x": make(rows, cols), "weight": make(n, cols, dtype=torch.float32)},
        lambda x, weight: [exact.exact(x) @ exact.exact(weight).T],
        lambda x, weight, impl: [ds.route_hidden(x, weight, top_k=8, impl=impl)[1]],
        lambda x, weight: [x.float() @ weight.T],
        NOT_FINITE,
    )


def _experts_e4m3() -> Probe:
    def run(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, experts: Tensor, impl: str) -> Tensor:
        return ds.fused_experts(x, w13, w2, Routing(weights, experts, experts, experts), fp8=True, impl=impl)

    def peer(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        x, w13, w2 = (per_tensor(part).to(x.dtype) for part in (x, w13, w2))
        return _network(x, w13, w2, weights, experts)

    return Probe(
        "fused_experts, e4m3 inside",
        [(9, 256, 128), (33, 512, 256)],
        _network_inputs,
        lambda **given: [exact.fused_experts(**given)],
        run,
        peer,
        ("subnormal", *NOT_FINITE),
    )


def _feed_forward() -> Probe:
    def inputs(make: Make, rows: int, hidden: int, inner: int) -> dict[str, Any]:
        x = make(rows, hidden)
        return {
            "x": x,
            "w13": make(2 * inner, hidden, scale=hidden**-0.5),
            "w2": make(hidden, inner, scale=inner**-0.5),
        }

    def peer(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        gate, up = F.linear(x, w13).chunk(2, -1)
        return F.linear(F.silu(gate) * up, w2)

    return Probe(
        "feed_forward, bf16",
        [(9, 256, 128), (130, 512, 256)],
        inputs,
        lambda x, w13, w2: [exact.expert(*map(exact.exact, (x, w13, w2)))],
        lambda x, w13, w2, impl: ds.feed_forward(x, w13, w2, impl=impl),
        peer,
        ("subnormal",),
    )


def _values() -> Probe:
    def inputs(make: Make, rows: int, heads: int) -> dict[str, Any]:
        return {"latents": make(rows, heads, 512), "w_uv": make(heads, 128, 512, scale=512**-0.5)}

    return Probe(
        "mla_values_quantize",
        [(5, 2), (33, 16)],
        inputs,
        lambda latents, w_uv: [exact.mla_values(latents, w_uv)],
        lambda latents, w_uv, impl: ds.mla_values_quantize(latents, w_uv, impl=impl),
        lambda latents, w_uv: per_tensor(torch.einsum("thl,hvl->thv", latents, w_uv).flatten(1)),
        NOT_FINITE,
    )


def _cached() -> Probe:
    def inputs(make: Make, new: int, length: int, heads: int) -> dict[str, Any]:
        pages = -(-length // 64)
        return {
            "q": make(new, heads, 192),
            "kv_b": make(heads * 256, 512, scale=512**-0.5),
            "cache": make(pages, 64, 576),
            "block_table": torch.arange(pages, dtype=torch.int32)[None],
            "lengths": torch.tensor([length], dtype=torch.int32),
            "cu_seqlens_q": torch.tensor([0, new], dtype=torch.int32),
        }

    def peer(q: Tensor, kv_b: Tensor, cache: Tensor, lengths: Tensor, **_: Any) -> list[Tensor]:
        rows = cache.flatten(0, 1)[: int(lengths[0])]
        keys, values = F.linear(rows[:, :512], kv_b).unflatten(1, (q.shape[1], 256)).tensor_split(2, -1)
        keys = torch.cat([keys, rows[:, None, 512:].expand(-1, q.shape[1], -1)], -1)
        score = torch.einsum("thd,shd->hts", q, keys).float() * SCALE
        seen = torch.ones_like(score[0], dtype=torch.bool).tril(len(rows) - len(q))
        p = score.masked_fill(~seen, float("-inf")).softmax(-1).to(q.dtype)
        return [torch.einsum("hts,shd->thd", p, values)]

    return Probe(
        "mla_prefill_cached",
        [(5, 70, 2), (40, 200, 4)],
        inputs,
        lambda **given: [exact.mla_prefill_cached(**given, scale=SCALE, value_dim=128)[0]],
        lambda impl, **given: [ds.mla_prefill_cached(**given, scale=SCALE, impl=impl)[0]],
        peer,
    )


def _linear_gradients() -> Probe:
    def run(dy: Tensor, x: Tensor, weight: Tensor, impl: str) -> Any:
        x, weight = _leaves(x, weight)
        return torch.autograd.grad(ds.fp8_linear(x, weight, impl=impl), (x, weight), dy)

    return Probe(
        "gradients of fp8_linear",
        [(33, 256, 512), (130, 256, 1024)],
        lambda make, m, n, k: {"dy": make(m, n), "x": make(m, k), "weight": make(n, k, scale=k**-0.5)},
        lambda dy, x, weight: [exact.exact(dy) @ exact.exact(weight), exact.exact(dy).T @ exact.exact(x)],
        run,
        lambda dy, x, weight: [per_tensor(dy) @ per_tensor(weight), per_tensor(dy).T @ per_tensor(x)],
        NOT_FINITE,
    )


def _prefill_gradients() -> Probe:
    def inputs(make: Make, tokens: int, heads: int) -> dict[str, Any]:
        dout, q, k = make(tokens, heads, 128), make(tokens, heads, 192), make(tokens, heads, 192)
        return {"dout": dout, "q": q, "k": k, "v": make(tokens, heads, 128)}

    def run(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, impl: str) -> Any:
        q, k, v = given = _leaves(q, k, v)
        cu = torch.tensor([0, q.shape[0]], dtype=torch.int32, device=q.device)
        return torch.autograd.grad(ds.mla_prefill(q, k, v, cu, cu, scale=SCALE, impl=impl)[0], given, dout)

    def by_torch(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, wide: bool = False) -> Any:
        q, k, v = given = _leaves(q, k, v, wide=wide)
        return torch.autograd.grad(_attention(q, k, v), given, exact.exact(dout) if wide else dout)

    return Probe(
        "gradients of mla_prefill",
        [(70, 2), (200, 1)],
        inputs,
        lambda **given: by_torch(**given, wide=True),
        run,
        by_torch,
        ("subnormal", *NOT_FINITE),
    )


def _experts_gradients() -> Probe:
    def inputs(make: Make, rows: int, hidden: int, inner: int) -> dict[str, Any]:
        return {"dout": make(rows, hidden), **_network_inputs(make, rows, hidden, inner)}

    def run(dout: Tensor, experts: Tensor, impl: str, **given: Tensor) -> Any:
        x, w13, w2, weights = leaves = _leaves(*given.values())
        out = ds.fused_experts(x, w13, w2, Routing(weights, experts, experts, experts), impl=impl)
        return torch.autograd.grad(out, leaves, dout)

    def by_torch(dout: Tensor, experts: Tensor, wide: bool = False, **given: Tensor) -> Any:
        x, w13, w2, weights = leaves = _leaves(*given.values(), wide=wide)
        out = _network(x, w13, w2, weights, experts)
        return torch.autograd.grad(out, leaves, exact.exact(dout) if wide else dout)

    return Probe(
        "gradients of fused_experts, bf16",
        [(9, 256, 128), (33, 512, 256)],
        inputs,
        lambda **given: by_torch(**given, wide=True),
        run,
        by_torch,
        ("subnormal", *NOT_FINITE),
    )


COMPOSED: tuple[Probe, ...] = (
    _both(),
    _swiglu_backward(),
    _masked(),
    _route_hidden(),
    _experts_e4m3(),
    _feed_forward(),
    _values(),
    _cached(),
    _linear_gradients(),
    _prefill_gradients(),
    _experts_gradients(),
)
