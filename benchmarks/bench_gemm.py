"""The dense fp8 matrix product at the linears of DeepSeek-V3, and the whole linear layer in training."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import dskernels as ds
from benchmarks import inputs, roofline, workloads
from benchmarks.cases import Call, Case
from benchmarks.peers import Peer
from benchmarks.peers import gemm as gemm_peers


@dataclass(frozen=True)
class Fp8Gemm(Case):
    """`fp8_gemm`: activations in 1x128 tiles by weights in 128x128 blocks, bf16 out."""

    workload: workloads.Gemm

    @property
    def op(self) -> str:
        return "fp8_gemm"

    def work(self):
        return roofline.gemm(self.workload)

    def inputs(self, device):
        w = self.workload
        return SimpleNamespace(a=inputs.activation(w.m, w.k, device), b=inputs.weight(w.n, w.k, device))

    def ours(self, x, impl) -> Call:
        return lambda: ds.fp8_gemm(x.a, x.b, impl=impl)

    def peers(self, x):
        return {
            "cublaslt": lambda: gemm_peers.cublaslt(x.a, x.b),
            "deepgemm": lambda: gemm_peers.deepgemm(x.a, x.b),
            "torch": lambda: gemm_peers.matmul(x.a, x.b),
        }


@dataclass(frozen=True)
class Fp8Wgrad(Case):
    """`fp8_gemm` of 1x128 by 1x128 tiles along `m` tokens, the gradient of an [n, k] weight in fp32, stored."""

    workload: workloads.Gemm
    tolerance = 1e-6

    @property
    def op(self) -> str:
        return "fp8_gemm_wgrad"

    def work(self):
        return roofline.gemm_wgrad(self.workload)

    def inputs(self, device):
        w = self.workload
        return SimpleNamespace(dy_t=inputs.activation(w.n, w.m, device), x_t=inputs.activation(w.k, w.m, device))

    def ours(self, x, impl) -> Call:
        return lambda: ds.fp8_gemm(x.dy_t, x.x_t, out_dtype=torch.float32, impl=impl)

    def peers(self, x):
        return {"torch": lambda: gemm_peers.matmul(x.dy_t, x.x_t)}


@dataclass(frozen=True)
class Fp8LinearTraining(Case):
    """`fp8_linear` forward and backward, quantising x and dy; the quantised weight is kept between steps."""

    workload: workloads.Gemm
    tolerance = 1e-5

    @property
    def op(self) -> str:
        return "fp8_linear_training"

    def work(self):
        return roofline.linear_training(self.workload)

    def inputs(self, device):
        w = self.workload
        return SimpleNamespace(
            x=inputs.bf16(w.m, w.k, device=device).requires_grad_(),
            weight=inputs.bf16(w.n, w.k, device=device, scale=w.k**-0.5).requires_grad_(),
            dy=inputs.bf16(w.m, w.n, device=device),
        )

    def ours(self, x, impl) -> Call:
        def step():
            y = ds.fp8_linear(x.x, x.weight, impl=impl)
            return y.detach(), *torch.autograd.grad(y, (x.x, x.weight), x.dy)

        return step

    def forward(self, x, impl) -> Call:
        return lambda: ds.fp8_linear(x.x, x.weight, impl=impl)

    def peers(self, x):
        def step():
            y = F.linear(x.x, x.weight)
            return y.detach(), *torch.autograd.grad(y, (x.x, x.weight), x.dy)

        return {"torch": lambda: Peer(step)}


CASES: list[Case] = [
    *(Fp8Gemm(w) for w in workloads.GEMMS),
    *(Fp8Wgrad(w) for w in workloads.LINEAR_LAYERS),
    *(Fp8LinearTraining(w) for w in workloads.LINEAR_LAYERS),
]
