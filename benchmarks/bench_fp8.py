"""Quantising, alone and fused with what precedes it in a layer. Bound by memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import dskernels as ds
from benchmarks import inputs, peers, roofline, workloads
from benchmarks.cases import Call, Case
from benchmarks.peers import gemm as gemm_peers
from dskernels import reference

EPS = 1e-6
COMPILED_FROM = 4096  # tokens; compiling takes seconds, and for smaller batches tells little


@dataclass(frozen=True)
class Quantize(Case):
    """`quantize` in one of its layouts, or of a stack of matrices, bitwise like the reference."""

    workload: workloads.Rows
    block: tuple[int, int] = (1, 128)
    scale_format: str = "fp32"
    transpose: bool = False
    stack: int | None = None

    @property
    def op(self) -> str:
        block = "" if self.block == (1, 128) else f"_{self.block[0]}x{self.block[1]}"
        stack = "" if self.stack is None else f"_stack{self.stack}"
        ue8m0 = "_ue8m0" * (self.scale_format == "ue8m0")
        return f"quantize{block}{stack}{ue8m0}" + "_transposed" * self.transpose

    def work(self):
        one = roofline.quantize(self.workload, self.block)
        return one if self.stack is None else roofline.Work(None, self.stack * one.bytes)

    def inputs(self, device):
        stack = () if self.stack is None else (self.stack,)
        return SimpleNamespace(x=inputs.bf16(*stack, self.workload.m, self.workload.n, device=device))

    @property
    def _options(self) -> dict[str, Any]:
        return {"scale_format": self.scale_format, "transpose": self.transpose}

    def ours(self, x, impl) -> Call:
        return lambda: ds.quantize(x.x, self.block, impl=impl, **self._options)

    def peers(self, x):
        job = partial(reference.quantize, x.x, self.block, **self._options)
        found = {"torch": peers.eager(job)}
        if self.op == "quantize":
            if self.workload.m >= COMPILED_FROM:
                found["torch_compile"] = peers.compiled(job)
            found["vllm"] = lambda: gemm_peers.vllm_quantize(x.x)
        return found

    def comparable_peer(self, out):
        return out.dequantize()


@dataclass(frozen=True)
class QuantizeBoth(Case):
    """A gradient for dgrad and for wgrad in one pass, bitwise like the reference."""

    workload: workloads.Rows

    @property
    def op(self) -> str:
        return "quantize_both"

    def work(self):
        return roofline.quantize_both(self.workload)

    def inputs(self, device):
        return SimpleNamespace(x=inputs.bf16(self.workload.m, self.workload.n, device=device))

    def ours(self, x, impl) -> Call:
        return lambda: ds.quantize_both(x.x, impl=impl)

    def peers(self, x):
        return {"torch": peers.eager(partial(reference.quantize_both, x.x))}


@dataclass(frozen=True)
class SwigluQuantize(Case):
    """The gated product of an expert, quantised; workload (tokens, width of the expert)."""

    workload: workloads.Rows
    transpose: bool = False
    tolerance = 1e-5  # a rare element is rounded to the other side, because exp is computed differently

    @property
    def op(self) -> str:
        return "swiglu_quantize" + "_transposed" * self.transpose

    def work(self):
        return roofline.swiglu_quantize(self.workload, transpose=self.transpose)

    def inputs(self, device):
        return SimpleNamespace(gate_up=inputs.bf16(self.workload.m, 2 * self.workload.n, device=device))

    def ours(self, x, impl) -> Call:
        return lambda: ds.swiglu_quantize(x.gate_up, transpose=self.transpose, impl=impl)

    def comparable(self, out):
        return out.dequantize()

    def peers(self, x):
        job = partial(reference.swiglu_quantize, x.gate_up, transpose=self.transpose)
        found = {"torch": peers.eager(job)}
        if self.workload.m == COMPILED_FROM and not self.transpose:
            found["torch_compile"] = peers.compiled(job)
        return found


@dataclass(frozen=True)
class SwigluQuantizeBackward(Case):
    """The gradient of the gated product, quantised for dgrad and for wgrad; workload (tokens, width of the expert)."""

    workload: workloads.Rows
    tolerance = 1e-5  # as above

    @property
    def op(self) -> str:
        return "swiglu_quantize_backward"

    def work(self):
        return roofline.swiglu_quantize_backward(self.workload)

    def inputs(self, device):
        m, n = self.workload.m, self.workload.n
        return SimpleNamespace(dy=inputs.bf16(m, n, device=device), gate_up=inputs.bf16(m, 2 * n, device=device))

    def ours(self, x, impl) -> Call:
        return lambda: ds.swiglu_quantize_backward(x.dy, x.gate_up, impl=impl)

    def comparable(self, out):
        return tuple(part.dequantize() for part in out)

    def peers(self, x):
        return {"torch": peers.eager(partial(reference.swiglu_quantize_backward, x.dy, x.gate_up))}


@dataclass(frozen=True)
class RmsnormQuantize(Case):
    """The norm before a linear layer, quantised, with or without adding to the residual stream first."""

    workload: workloads.Rows
    residual: bool = False
    tolerance = 1e-5  # as for SwiGLU, because sums are in another order

    @property
    def op(self) -> str:
        return "rmsnorm_quantize" + ("_residual" * self.residual)

    def work(self):
        return roofline.rmsnorm_quantize(self.workload, residual=self.residual)

    def inputs(self, device):
        m, n = self.workload.m, self.workload.n
        return SimpleNamespace(
            x=inputs.bf16(m, n, device=device),
            weight=inputs.bf16(n, device=device),
            residual=inputs.bf16(m, n, device=device) if self.residual else None,
        )

    def ours(self, x, impl) -> Call:
        return lambda: ds.rmsnorm_quantize(x.x, x.weight, EPS, x.residual, impl=impl)

    def comparable(self, out):
        return (out[0].dequantize(), out[1]) if self.residual else out.dequantize()

    def peers(self, x):
        job = partial(reference.rmsnorm_quantize, x.x, x.weight, EPS, x.residual)
        found = {"torch": peers.eager(job)}
        if self.workload.m >= COMPILED_FROM:
            found["torch_compile"] = peers.compiled(job)
        return found


@dataclass(frozen=True)
class RmsnormBackward(Case):
    """The gradient of the norm, with or without a gradient that arrives through the residual stream."""

    workload: workloads.Rows
    residual: bool = False

    @property
    def op(self) -> str:
        return "rmsnorm_backward" + ("_residual" * self.residual)

    def work(self):
        return roofline.rmsnorm_backward(self.workload, residual=self.residual)

    def inputs(self, device):
        m, n = self.workload.m, self.workload.n
        return SimpleNamespace(
            dy=inputs.bf16(m, n, device=device),
            x=inputs.bf16(m, n, device=device),
            weight=inputs.bf16(n, device=device),
            dresidual=inputs.bf16(m, n, device=device) if self.residual else None,
        )

    def ours(self, x, impl) -> Call:
        return lambda: ds.rmsnorm_backward(x.dy, x.x, x.weight, EPS, x.dresidual, impl=impl)

    def peers(self, x):
        job = partial(reference.rmsnorm_backward, x.dy, x.x, x.weight, EPS, x.dresidual)
        found = {"torch": peers.eager(job)}
        if self.workload.m >= COMPILED_FROM:
            found["torch_compile"] = peers.compiled(job)
        return found


CASES: list[Case] = [
    *(Quantize(w) for w in (*workloads.ACTIVATIONS, *workloads.WEIGHTS[1:])),
    *(Quantize(w, scale_format="ue8m0") for w in workloads.ACTIVATIONS[:1]),
    *(Quantize(w, (128, 1)) for w in workloads.ACTIVATIONS[:1]),
    *(Quantize(w, (128, 1), transpose=True) for w in workloads.WEIGHTS),
    *(Quantize(w, (128, 128)) for w in workloads.WEIGHTS),
    *(Quantize(w, (128, 128), transpose=True) for w in workloads.WEIGHTS[:1]),
    *(Quantize(w, (128, 128), stack=8) for w in workloads.WEIGHTS[:1]),
    *(QuantizeBoth(w) for w in workloads.WEIGHTS),
    *(SwigluQuantize(w) for w in workloads.GATED),
    *(SwigluQuantize(w, transpose=True) for w in workloads.GATED[:2]),
    *(SwigluQuantizeBackward(w) for w in workloads.GATED[:2]),
    *(RmsnormQuantize(w) for w in workloads.ACTIVATIONS),
    *(RmsnormQuantize(w, residual=True) for w in workloads.ACTIVATIONS),
    *(RmsnormBackward(w) for w in workloads.ACTIVATIONS),
    *(RmsnormBackward(w, residual=True) for w in workloads.ACTIVATIONS[:1]),
]
