"""The experts' matrix products: ragged rows, a masked buffer for each expert, and the weight gradient."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

import dskernels as ds
from benchmarks import inputs, roofline, workloads
from benchmarks.cases import Call, Case
from benchmarks.peers import gemm as gemm_peers
from dskernels import Fp8Tensor


@dataclass(frozen=True)
class GroupedGemm(Case):
    """`grouped_gemm`: the rows of all experts one after the other."""

    workload: workloads.GroupedGemm
    fp8: bool = True

    @property
    def op(self) -> str:
        return "grouped_gemm" if self.fp8 else "grouped_gemm_bf16"

    def work(self):
        return roofline.grouped_gemm(self.workload, fp8=self.fp8)

    def inputs(self, device):
        w = self.workload
        rows = sum(w.rows)
        a: Tensor | Fp8Tensor
        b: Tensor | Fp8Tensor
        if self.fp8:
            a, b = inputs.activation(rows, w.k, device), inputs.expert_weights(w.g, w.n, w.k, device)
        else:
            a = inputs.bf16(rows, w.k, device=device)
            b = inputs.bf16(w.g, w.n, w.k, device=device, scale=w.k**-0.5)
        return SimpleNamespace(a=a, b=b, offsets=inputs.offsets(w.rows, device))

    def ours(self, x, impl) -> Call:
        return lambda: ds.grouped_gemm(x.a, x.b, x.offsets, impl=impl)

    def peers(self, x):
        found = {"grouped_mm": lambda: gemm_peers.grouped_mm(x.a, x.b, x.offsets)}
        if self.fp8:
            found["deepgemm"] = lambda: gemm_peers.deepgemm_grouped(x.a, x.b, self.workload.rows)
        return found


@dataclass(frozen=True)
class GroupedGemmMasked(Case):
    """`grouped_gemm_masked`: a buffer of fixed height for each expert, whose first rows are valid."""

    workload: workloads.GroupedGemm

    @property
    def op(self) -> str:
        return "grouped_gemm_masked"

    def work(self):
        return roofline.grouped_gemm(self.workload)

    def inputs(self, device):
        w = self.workload
        flat = inputs.activation(w.g * w.capacity, w.k, device)
        a = Fp8Tensor(*(t.unflatten(0, (w.g, w.capacity)) for t in (flat.data, flat.scale)))
        counts = torch.tensor(w.rows, dtype=torch.int32, device=device)
        return SimpleNamespace(a=a, b=inputs.expert_weights(w.g, w.n, w.k, device), counts=counts)

    def ours(self, x, impl) -> Call:
        return lambda: ds.grouped_gemm_masked(x.a, x.b, x.counts, impl=impl)

    def comparable(self, out):
        """The valid rows; the others are unspecified."""
        return [out[e, :n] for e, n in enumerate(self.workload.rows)]

    def peers(self, x):
        return {
            "deepgemm": lambda: gemm_peers.deepgemm_masked(x.a, x.b, x.counts, self.workload.m),
            "torch": lambda: gemm_peers.batched_matmul(x.a, x.b),
        }


@dataclass(frozen=True)
class GroupedWgrad(Case):
    """`grouped_wgrad` of operands quantised along each expert's tokens."""

    workload: workloads.GroupedGemm

    @property
    def op(self) -> str:
        return "grouped_wgrad"

    def work(self):
        return roofline.grouped_wgrad(self.workload)

    def inputs(self, device):
        w = self.workload
        rows, offsets = sum(w.rows), inputs.offsets(w.rows, device)
        dy, x = inputs.bf16(rows, w.n, device=device), inputs.bf16(rows, w.k, device=device)
        return SimpleNamespace(
            dy=dy,
            x=x,
            dy_8=ds.quantize_grouped(dy, offsets, impl="reference"),
            x_8=ds.quantize_grouped(x, offsets, impl="reference"),
            offsets=offsets,
        )

    def ours(self, x, impl) -> Call:
        return lambda: ds.grouped_wgrad(x.dy_8, x.x_8, x.offsets, impl=impl)

    def peers(self, x):
        return {
            "grouped_mm": lambda: gemm_peers.grouped_mm_wgrad(x.dy, x.x, x.offsets),
            "deepgemm": lambda: gemm_peers.deepgemm_wgrad(x.dy_8, x.x_8, self.workload.rows),
        }


@dataclass(frozen=True)
class QuantizeGrouped(Case):
    """`quantize_grouped`: an operand of wgrad, quantised along each expert's tokens, bitwise like the reference."""

    workload: workloads.GroupedRows

    @property
    def op(self) -> str:
        return "quantize_grouped"

    def work(self):
        return roofline.quantize_grouped(self.workload)

    def inputs(self, device):
        w = self.workload
        return SimpleNamespace(x=inputs.bf16(sum(w.rows), w.n, device=device), offsets=inputs.offsets(w.rows, device))

    def ours(self, x, impl) -> Call:
        return lambda: ds.quantize_grouped(x.x, x.offsets, impl=impl)


CASES: list[Case] = [
    *(GroupedGemm(w) for w in workloads.GROUPED),
    *(GroupedGemm(w, fp8=False) for w in workloads.GROUPED_BF16),
    *(GroupedGemmMasked(w) for w in workloads.MASKED),
    *(GroupedWgrad(w) for w in workloads.GROUPED_WGRAD),
    *(QuantizeGrouped(w) for w in workloads.GROUPED_ROWS),
]
