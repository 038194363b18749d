"""Sweeps over one size: how time grows with rows, experts, tokens, batch, context, heads. The report draws them."""

from __future__ import annotations

from benchmarks import workloads as w
from benchmarks.bench_gemm import Fp8Gemm
from benchmarks.bench_mla import Decode, Prefill
from benchmarks.bench_moe import FusedExperts
from benchmarks.bench_routing import Route
from benchmarks.cases import Case

ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
EXPERTS = (8, 16, 32, 64, 128, 256)
TOKENS = (1, 8, 64, 512, 2048, 8192)
ROUTED = (1, 16, 256, 4096, 32768)
BATCHES = (1, 4, 16, 64, 128, 256)
CONTEXTS = (512, 2048, 8192, 32768, 131072)
HEADS = (8, 16, 32, 64, 128)
PROMPTS = (512, 1024, 2048, 4096, 8192, 16384)

SWEEPS: tuple[Case, ...] = (
    *(Fp8Gemm(w.Gemm(m, *w.EXPERT_GATE_UP)) for m in ROWS),
    *(FusedExperts(w.Moe(128, e=e)) for e in EXPERTS),
    *(FusedExperts(w.Moe(t)) for t in TOKENS),
    *(Route(w.Route(t)) for t in ROUTED),
    *(Decode(w.Decode(b, 4096)) for b in BATCHES),
    *(Decode(w.Decode(16, s)) for s in CONTEXTS),
    *(Decode(w.Decode(128, 4096, h=h)) for h in HEADS),
    *(Prefill(w.Prefill(1, s)) for s in PROMPTS),
)

# Two sweeps may have a job in common.
CASES: list[Case] = list({case.title: case for case in SWEEPS}.values())
