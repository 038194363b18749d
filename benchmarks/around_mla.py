"""The operations around latent attention: writing the cache, decode's queries and values, merging two results."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch

import dskernels as ds
from benchmarks import inputs, peers, roofline, workloads
from benchmarks.cases import Call, Case
from benchmarks.peers import attention as attention_peers
from benchmarks.workloads import FP8_ROW_BYTES, LATENT_DIM, NOPE_DIM, QK_DIM, ROPE_DIM, ROW_DIM, VALUE_DIM

EPS = 1e-6


@dataclass(frozen=True)
class DecodeQueries(Case):
    """`mla_decode_queries`: the key's up-projection, absorbed, and the rotation."""

    workload: workloads.Tokens

    @property
    def op(self) -> str:
        return "mla_decode_queries"

    def work(self):
        return roofline.decode_queries(self.workload)

    def inputs(self, device):
        t, h = self.workload.t, self.workload.h
        angle = torch.rand(t, ROPE_DIM // 2, device=device) * 6.28
        kv_b = inputs.bf16(h, NOPE_DIM + VALUE_DIM, LATENT_DIM, device=device, scale=NOPE_DIM**-0.5)
        q = inputs.bf16(t, h, QK_DIM, device=device)
        return SimpleNamespace(q=q, w_uk=kv_b[:, :NOPE_DIM], cos=angle.cos(), sin=angle.sin())

    def ours(self, x, impl) -> Call:
        return lambda: ds.mla_decode_queries(x.q, x.w_uk, x.cos, x.sin, impl=impl)

    def peers(self, x):
        return {"torch": peers.eager(lambda: attention_peers.eager_queries(x.q, x.w_uk, x.cos, x.sin))}


@dataclass(frozen=True)
class ValuesQuantize(Case):
    """`mla_values_quantize`: the values' up-projection, absorbed, and e4m3 of what it gives."""

    workload: workloads.Tokens
    tolerance = 1e-4  # another order of summation may move a rounding to e4m3, by a sixteenth

    @property
    def op(self) -> str:
        return "mla_values_quantize"

    def work(self):
        return roofline.values_quantize(self.workload)

    def inputs(self, device):
        t, h = self.workload.t, self.workload.h
        kv_b = inputs.bf16(h, NOPE_DIM + VALUE_DIM, LATENT_DIM, device=device, scale=LATENT_DIM**-0.5)
        return SimpleNamespace(latents=inputs.bf16(t, h, LATENT_DIM, device=device), w_uv=kv_b[:, NOPE_DIM:])

    def ours(self, x, impl) -> Call:
        return lambda: ds.mla_values_quantize(x.latents, x.w_uv, impl=impl)

    def comparable(self, out):
        return out.dequantize(torch.float32)

    def peers(self, x):
        return {"torch": peers.eager(self.ours(x, "reference"))}


@dataclass(frozen=True)
class WriteLatentCache(Case):
    """`write_latent_cache`: norm, rotation, and the scattered store, in bf16 or fp8."""

    workload: workloads.Tokens
    fp8: bool = False
    tolerance = 1e-5
    page = 64

    @property
    def op(self) -> str:
        return "write_latent_cache" + ("_fp8" * self.fp8)

    def work(self):
        return roofline.write_cache(self.workload, row_bytes=FP8_ROW_BYTES if self.fp8 else 2 * ROW_DIM)

    def inputs(self, device):
        t, pages = self.workload.t, -(-self.workload.t // self.page)
        angle = torch.rand(t, ROPE_DIM // 2, device=device) * 6.28
        shape, dtype = ((FP8_ROW_BYTES,), torch.uint8) if self.fp8 else ((ROW_DIM,), torch.bfloat16)
        return SimpleNamespace(
            kv=inputs.bf16(t, LATENT_DIM, device=device),
            k_rope=inputs.bf16(t, ROPE_DIM, device=device),
            norm_weight=inputs.bf16(LATENT_DIM, device=device),
            cos=angle.cos(),
            sin=angle.sin(),
            cache=torch.zeros(pages, self.page, *shape, dtype=dtype, device=device),
            slots=inputs.slots(t, device),
        )

    def ours(self, x, impl) -> Call:
        cache = x.cache.clone()  # each caller fills its own cache
        job = (x.kv, x.k_rope, x.norm_weight, x.cos, x.sin, cache, x.slots)

        def write():
            ds.write_latent_cache(*job, eps=EPS, impl=impl)
            return cache

        return write

    def comparable(self, out):
        """As numbers: an fp8 element may be rounded to the other side, after sums in another order."""
        if not self.fp8:
            return out
        data, scale, rope = out.split([LATENT_DIM, 16, 2 * ROPE_DIM], dim=-1)
        data = data.contiguous().view(torch.float8_e4m3fn).float().unflatten(-1, (-1, 128))
        return data * scale.contiguous().view(torch.float32)[..., None], rope.contiguous().view(torch.bfloat16)

    def peers(self, x):
        return {"torch": peers.eager(self.ours(x, "reference"))}


@dataclass(frozen=True)
class MergeStates(Case):
    """`merge_states` of two partial results."""

    workload: workloads.Tokens

    @property
    def op(self) -> str:
        return "merge_states"

    def work(self):
        return roofline.merge_states(self.workload)

    def inputs(self, device):
        t, h = self.workload.t, self.workload.h
        return SimpleNamespace(
            out_a=inputs.bf16(t, h, VALUE_DIM, device=device),
            lse_a=torch.randn(h, t, device=device),
            out_b=inputs.bf16(t, h, VALUE_DIM, device=device),
            lse_b=torch.randn(h, t, device=device),
        )

    def ours(self, x, impl) -> Call:
        return lambda: ds.merge_states(x.out_a, x.lse_a, x.out_b, x.lse_b, impl=impl)

    def peers(self, x):
        job = (x.out_a, x.lse_a, x.out_b, x.lse_b)
        return {
            "torch": peers.eager(self.ours(x, "reference")),
            "flashinfer": lambda: attention_peers.flashinfer_merge(*job),
            "vllm": lambda: attention_peers.vllm_merge(*job),
        }
