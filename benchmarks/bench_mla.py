"""Multi-head latent attention: decode over the latent cache, prefill and its gradient, and the operations around
them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch

import dskernels as ds
from benchmarks import inputs, peers, roofline, workloads
from benchmarks.around_mla import DecodeQueries, MergeStates, ValuesQuantize, WriteLatentCache
from benchmarks.cases import Call, Case, under
from benchmarks.peers import Peer
from benchmarks.peers import attention as attention_peers
from benchmarks.prefix_sharing import decode_with_prefix, decode_with_written_prefix
from benchmarks.workloads import FP8_ROW_BYTES, LATENT_DIM, NOPE_DIM, QK_DIM, ROW_DIM, VALUE_DIM

SCALE = QK_DIM**-0.5
ABSORBED = 160  # new tokens per request up to which nothing is expanded


def spread(n: int) -> list[int]:
    """The first and the last of `n` requests or heads, for the reference, whose score matrix is fp32 and complete."""
    return sorted({0, n - 1})


def latent_cache(rows: torch.Tensor, page: int, *, fp8: bool) -> torch.Tensor:
    """Cached rows ``[tokens, 576]`` as pages, in bf16 or as the 656 bytes of the fp8 format."""
    if not fp8:
        return rows.view(-1, page, ROW_DIM)
    packed = torch.empty(len(rows), FP8_ROW_BYTES, dtype=torch.uint8, device=rows.device)
    for part, source in zip(packed.split(65536), rows.split(65536), strict=True):
        latent = ds.quantize(source[:, :LATENT_DIM].contiguous(), impl="reference")
        rope = source[:, LATENT_DIM:].contiguous()
        fields = (latent.data, latent.scale.contiguous(), rope)
        part.copy_(torch.cat([field.view(torch.uint8) for field in fields], dim=-1))
    return packed.view(-1, page, FP8_ROW_BYTES)


class _Attention(Case):
    """What decode and prefill share: peers return the output without its log-sum-exp."""

    def comparable_peer(self, out):
        return out[0] if isinstance(out, tuple) else out


@dataclass(frozen=True)
class Decode(_Attention):
    """`mla_decode`, including the merging of partial results."""

    workload: workloads.Decode
    fp8: bool = False

    @property
    def tolerance(self) -> float:  # type: ignore[override]
        """An fp8 row is rounded to bf16 when it is dequantised, as key and as value, in addition to P and the
        output."""
        return 2e-5 if self.fp8 else 5e-6

    @property
    def op(self) -> str:
        return "mla_decode" + ("_fp8" * self.fp8)

    def work(self):
        return roofline.decode(self.workload, row_bytes=FP8_ROW_BYTES if self.fp8 else 2 * ROW_DIM)

    def inputs(self, device):
        w = self.workload
        rows = inputs.bf16(w.b * w.pages * w.page, ROW_DIM, device=device)
        return SimpleNamespace(
            q=inputs.bf16(w.b, w.q, w.h, ROW_DIM, device=device),
            cache=latent_cache(rows, w.page, fp8=self.fp8),
            block_table=inputs.block_table(w.b, w.pages, device),
            lengths=torch.tensor(w.lengths, dtype=torch.int32, device=device),
        )

    def ours(self, x, impl) -> Call:
        return lambda: ds.mla_decode(x.q, x.cache, x.block_table, x.lengths, scale=SCALE, impl=impl)

    def part(self, x):
        few = spread(self.workload.b)
        return SimpleNamespace(q=x.q[few], cache=x.cache, block_table=x.block_table[few], lengths=x.lengths[few])

    def part_of_output(self, out, x):
        few = spread(self.workload.b)
        return out[few] if isinstance(out, torch.Tensor) else tuple(o[few] for o in out)

    def peers(self, x):
        if self.fp8:
            return {}
        job = (x.q, x.cache, x.block_table, x.lengths, SCALE)
        return {
            "flashmla": lambda: attention_peers.flashmla_decode(*job),
            "flashinfer": lambda: attention_peers.flashinfer_decode(*job),
            "torch": peers.eager(lambda: attention_peers.eager_decode(*job)),
        }


@dataclass(frozen=True)
class DecodeWithPrefix(_Attention):
    """The recipe of docs/prefix_sharing.md, compared with decode that does not know about the common prefix."""

    workload: workloads.SharedPrefix

    @property
    def op(self) -> str:
        return "mla_decode_with_prefix"

    def work(self):
        return roofline.decode_with_prefix(self.workload)

    def inputs(self, device):
        w = self.workload
        prefix, own = -(-w.prefix // w.page), -(-w.own // w.page)
        pages = torch.randperm(prefix + w.b * own, device=device).int()
        rows = inputs.bf16(len(pages) * w.page, ROW_DIM, device=device)
        return SimpleNamespace(
            q=inputs.bf16(w.b, 1, w.h, ROW_DIM, device=device),
            cache=latent_cache(rows, w.page, fp8=False),
            block_table=torch.cat((pages[:prefix].expand(w.b, -1), pages[prefix:].view(w.b, own)), 1),
            lengths=torch.full((w.b,), w.prefix + w.own, dtype=torch.int32, device=device),
            prefix_pages=prefix,
        )

    def ours(self, x, impl) -> Call:
        job = (x.q, x.cache, x.block_table, x.lengths, x.prefix_pages)
        return under(impl, lambda: decode_with_prefix(*job, scale=SCALE))

    def part(self, x):
        few = spread(self.workload.b)
        own = {name: getattr(x, name)[few] for name in ("q", "block_table", "lengths")}
        return SimpleNamespace(**{**vars(x), **own})

    def part_of_output(self, out, x):
        few = spread(self.workload.b)
        return out[few] if isinstance(out, torch.Tensor) else tuple(o[few] for o in out)

    def peers(self, x):
        return {"unshared": lambda: self.unshared(x)}

    def unshared(self, x) -> Peer:
        """Every request reads the prefix separately."""
        return Peer(lambda: ds.mla_decode(x.q, x.cache, x.block_table, x.lengths, scale=SCALE))


@dataclass(frozen=True)
class DecodeWithWrittenPrefix(_Attention):
    """The other recipe of docs/prefix_sharing.md, compared with decode and the projection of its result."""

    workload: workloads.SharedPrefix
    tolerance = 2e-5  # keys, values and absorbed queries are rounded to bf16 as well

    @property
    def op(self) -> str:
        return "mla_decode_with_written_prefix"

    def work(self):
        return roofline.decode_with_written_prefix(self.workload)

    def inputs(self, device):
        w = self.workload
        x = DecodeWithPrefix(w).inputs(device)
        q = inputs.bf16(w.b, 1, w.h, QK_DIM, device=device)
        kv_b = inputs.bf16(w.h, NOPE_DIM + VALUE_DIM, LATENT_DIM, device=device, scale=LATENT_DIM**-0.5)
        w_uk, w_uv = kv_b.split((NOPE_DIM, VALUE_DIM), 1)
        nope, rope = q.split((NOPE_DIM, QK_DIM - NOPE_DIM), -1)
        rows = x.cache[x.block_table[0, : x.prefix_pages].long()].flatten(0, 1)
        k, v = (rows[:, :LATENT_DIM] @ kv_b.flatten(0, 1).t()).unflatten(1, (w.h, -1)).split((NOPE_DIM, VALUE_DIM), -1)
        absorbed = torch.cat((torch.einsum("bqhn,hnl->bqhl", nope, w_uk), rope), -1)
        return SimpleNamespace(
            q=q, absorbed=absorbed, w_uv=w_uv, k=k, k_rope=rows[:, LATENT_DIM:], v=v, cache=x.cache,
            block_table=x.block_table, lengths=x.lengths, pages=x.prefix_pages,
        )  # fmt: skip

    def ours(self, x, impl) -> Call:
        own, lengths = x.block_table[:, x.pages :], x.lengths - len(x.k)
        job = (x.q, x.absorbed, x.w_uv, x.k, x.k_rope, x.v, x.cache, own, lengths)
        return under(impl, lambda: decode_with_written_prefix(*job, scale=SCALE))

    def part(self, x):
        few = spread(self.workload.b)
        own = {name: getattr(x, name)[few] for name in ("q", "absorbed", "block_table", "lengths")}
        return SimpleNamespace(**{**vars(x), **own})

    def part_of_output(self, out, x):
        few = spread(self.workload.b)
        return out[few] if isinstance(out, torch.Tensor) else (out[0][few], out[1][:, few])

    def peers(self, x):
        return {"unshared": lambda: self.unshared(x)}

    def unshared(self, x) -> Peer:
        """Every request reads the latents of the prefix separately."""

        def run():
            latents, _ = ds.mla_decode(x.absorbed, x.cache, x.block_table, x.lengths, scale=SCALE)
            return torch.einsum("bqhl,hvl->bqhv", latents, x.w_uv)

        return Peer(run, lambda out: out.flatten(0, 1))


@dataclass(frozen=True)
class Prefill(_Attention):
    """`mla_prefill`, causal, of packed sequences of one length."""

    workload: workloads.Prefill

    @property
    def op(self) -> str:
        return "mla_prefill"

    def work(self):
        return roofline.prefill(self.workload)

    def inputs(self, device):
        w = self.workload
        t = w.b * w.s
        return SimpleNamespace(
            q=inputs.bf16(t, w.h, QK_DIM, device=device),
            k=inputs.bf16(t, w.h, QK_DIM, device=device),
            v=inputs.bf16(t, w.h, VALUE_DIM, device=device),
            d_out=inputs.bf16(t, w.h, VALUE_DIM, device=device),
            cu_seqlens=inputs.offsets([w.s] * w.b, device),
        )

    def ours(self, x, impl) -> Call:
        return lambda: ds.mla_prefill(x.q, x.k, x.v, x.cu_seqlens, x.cu_seqlens, scale=SCALE, impl=impl)

    def part(self, x):
        few = spread(self.workload.h)
        heads = {name: getattr(x, name)[:, few].contiguous() for name in ("q", "k", "v", "d_out")}
        return SimpleNamespace(**heads, cu_seqlens=x.cu_seqlens)

    def part_of_output(self, out, x):
        few = spread(self.workload.h)
        return out[:, few] if isinstance(out, torch.Tensor) else (out[0][:, few], out[1][few])

    def peers(self, x):
        return {
            "cudnn": lambda: attention_peers.cudnn_prefill(x.q, x.k, x.v, self.workload.b, SCALE),
            "flashinfer": lambda: attention_peers.flashinfer_prefill(x.q, x.k, x.v, x.cu_seqlens, SCALE),
        }


@dataclass(frozen=True)
class PackedPrefill(Prefill):
    """`mla_prefill`, causal, of packed sequences of mixed lengths."""

    workload: workloads.PackedPrefill  # type: ignore[assignment]

    def inputs(self, device):
        w = self.workload
        return SimpleNamespace(
            q=inputs.bf16(w.t, w.h, QK_DIM, device=device),
            k=inputs.bf16(w.t, w.h, QK_DIM, device=device),
            v=inputs.bf16(w.t, w.h, VALUE_DIM, device=device),
            cu_seqlens=inputs.offsets(w.lengths, device),
        )

    def part(self, x):
        few = spread(self.workload.h)
        heads = {name: getattr(x, name)[:, few].contiguous() for name in ("q", "k", "v")}
        return SimpleNamespace(**heads, cu_seqlens=x.cu_seqlens)

    def peers(self, x):
        return {"flashinfer": lambda: attention_peers.flashinfer_prefill(x.q, x.k, x.v, x.cu_seqlens, SCALE)}


@dataclass(frozen=True)
class PrefillBackward(Prefill):
    """The gradient of `mla_prefill` in q, k and v."""

    tolerance = 2e-5  # P and dS are both rounded to bf16 on the way

    @property
    def op(self) -> str:
        return "mla_prefill_backward"

    def work(self):
        return roofline.prefill_backward(self.workload)

    def ours(self, x, impl) -> Call:
        q, k, v = leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
        out, _ = ds.mla_prefill(q, k, v, x.cu_seqlens, x.cu_seqlens, scale=SCALE, impl=impl)
        return lambda: torch.autograd.grad(out, leaves, x.d_out, retain_graph=True)

    def forward(self, x, impl) -> Call:
        return super().ours(x, impl)

    def part_of_output(self, out, x):
        few = spread(self.workload.h)
        return tuple(grad[:, few] for grad in out)

    def comparable_peer(self, out):
        return out

    def peers(self, x):
        return {"cudnn": lambda: attention_peers.cudnn_prefill_backward(x.q, x.k, x.v, x.d_out, self.workload.b, SCALE)}


@dataclass(frozen=True)
class PrefillCached(_Attention):
    """`mla_prefill_cached`: a chunk of a long prompt over the cache that already holds it."""

    workload: workloads.ChunkedPrefill
    tolerance = 2e-5  # keys and values are rounded to bf16 as well

    @property
    def op(self) -> str:
        return "mla_prefill_cached"

    def work(self):
        return roofline.prefill_cached(self.workload)

    def inputs(self, device):
        w = self.workload
        return SimpleNamespace(
            q=inputs.bf16(w.b * w.q, w.h, QK_DIM, device=device),
            kv_b=inputs.bf16(w.h * (NOPE_DIM + VALUE_DIM), LATENT_DIM, device=device, scale=LATENT_DIM**-0.5),
            cache=inputs.bf16(w.b * w.pages, w.page, ROW_DIM, device=device),
            block_table=inputs.block_table(w.b, w.pages, device),
            lengths=torch.full((w.b,), w.s, dtype=torch.int32, device=device),
            cu_seqlens=inputs.offsets([w.q] * w.b, device),
        )

    def ours(self, x, impl) -> Call:
        job = (x.q, x.kv_b, x.cache, x.block_table, x.lengths, x.cu_seqlens)
        return lambda: ds.mla_prefill_cached(*job, scale=SCALE, impl=impl)

    def part(self, x):
        few = spread(self.workload.h)
        kv_b = x.kv_b.view(self.workload.h, NOPE_DIM + VALUE_DIM, LATENT_DIM)[few].flatten(0, 1)
        return SimpleNamespace(**{**vars(x), "q": x.q[:, few].contiguous(), "kv_b": kv_b})

    def part_of_output(self, out, x):
        few = spread(self.workload.h)
        return out[:, few] if isinstance(out, torch.Tensor) else (out[0][:, few], out[1][few])

    def peers(self, x):
        w = self.workload
        given = x.q, x.kv_b, x.cache, x.block_table, w.b, w.s, SCALE
        found = {"cudnn": lambda: attention_peers.cudnn_prefill_cached(*given)}
        # For few new tokens attention is absorbed, and peers with expanded keys and values would do another job.
        return found if w.q <= ABSORBED else {"uncached": lambda: self.uncached(x), **found}

    def uncached(self, x) -> Peer:
        """`mla_prefill` over existing keys and values: without gathering, expanding and merging."""
        w = self.workload
        row = x.cache[x.block_table.long()].flatten(1, 2)[:, : w.s].flatten(0, 1)
        k, v = (row[:, :LATENT_DIM] @ x.kv_b.t()).unflatten(1, (w.h, -1)).tensor_split([NOPE_DIM], -1)
        job = (x.q, k, v, x.cu_seqlens, inputs.offsets([w.s] * w.b, x.q.device))
        return Peer(lambda: ds.mla_prefill(*job, scale=SCALE, k_rope=row[:, LATENT_DIM:]))


CASES: list[Case] = [
    *(Decode(w) for w in workloads.DECODES),
    *(Decode(w, fp8=True) for w in workloads.FP8_DECODES),
    *(Prefill(w) for w in workloads.PREFILLS + workloads.EQUAL_PREFILLS),
    *(PackedPrefill(w) for w in workloads.PACKED_PREFILLS),
    *(PrefillBackward(w) for w in workloads.PREFILLS),
    *(PrefillCached(w) for w in workloads.CHUNKED_PREFILLS),
    *(DecodeWithPrefix(w) for w in workloads.SHARED_PREFIXES),
    *(DecodeWithWrittenPrefix(w) for w in workloads.WRITTEN_PREFIXES),
    *(DecodeQueries(w) for w in workloads.DECODE_QUERIES),
    *(ValuesQuantize(w) for w in workloads.DECODE_VALUES),
    *(WriteLatentCache(w) for w in workloads.CACHE_WRITES),
    *(WriteLatentCache(w, fp8=True) for w in workloads.CACHE_WRITES[1:]),
    *(MergeStates(w) for w in workloads.MERGES),
]
