"""Moving tokens to their experts and back, and the whole expert block."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

import dskernels as ds
from benchmarks import inputs, peers, roofline, workloads
from benchmarks.cases import Call, Case
from benchmarks.peers import moe as moe_peers
from dskernels import Fp8Tensor, Routing, reference

CHECKED_TOKENS = 4  # the reference dequantises all experts that these chose: 32 of them have 1.4 G weights


def routing(w: workloads.Moe, device: torch.device) -> Routing:
    """Every token chooses `k` different experts, all with equal probability."""
    scores = torch.rand(w.t, w.e, device=device)
    weights, experts = scores.topk(w.k, dim=-1)
    load = torch.bincount(experts.flatten(), minlength=w.e).int()
    nonfinite = torch.zeros((), dtype=torch.int32, device=device)
    return Routing(weights / weights.sum(-1, keepdim=True), experts.int(), load, nonfinite)


@dataclass(frozen=True)
class Permute(Case):
    """`permute`, exact."""

    workload: workloads.Moe

    @property
    def op(self) -> str:
        return "permute"

    def work(self):
        return roofline.permute(self.workload)

    def inputs(self, device):
        w = self.workload
        return SimpleNamespace(x=inputs.bf16(w.t, w.h, device=device), experts=routing(w, device).experts)

    def ours(self, x, impl) -> Call:
        return lambda: ds.permute(x.x, x.experts, self.workload.e, impl=impl)

    def peers(self, x):
        return {"torch": peers.eager(lambda: reference.permute(x.x, x.experts, self.workload.e))}


@dataclass(frozen=True)
class Combine(Case):
    """`combine`, summed in the order of the choices."""

    workload: workloads.Moe

    @property
    def op(self) -> str:
        return "combine"

    def work(self):
        return roofline.combine(self.workload)

    def inputs(self, device):
        w = self.workload
        chosen = routing(w, device)
        narrow = torch.empty(w.t, 1, device=device, dtype=torch.bfloat16)  # only its offsets and index are used
        permuted = ds.permute(narrow, chosen.experts, w.e, impl="reference")
        y = inputs.bf16(w.t * w.k, w.h, device=device)
        return SimpleNamespace(y=y, permuted=permuted, weights=chosen.weights)

    def ours(self, x, impl) -> Call:
        return lambda: ds.combine(x.y, x.permuted, x.weights, impl=impl)

    def peers(self, x):
        def gather_and_sum():
            rows = x.y[x.permuted.index.flatten()].view(*x.permuted.index.shape, -1)
            return torch.einsum("tkh,tk->th", rows.float(), x.weights).to(x.y.dtype)

        return {"torch": peers.eager(gather_and_sum)}


@dataclass(frozen=True)
class FusedExperts(Case):
    """`fused_experts` with fp8 weights, as in serving: quantise, two grouped products, SwiGLU, combine."""

    workload: workloads.Moe
    shared: bool = False
    # The result of the first product is quantised again: a rounding before that may move it by one e4m3 step.
    tolerance = 1e-3
    peer_tolerance = 5e-3  # bf16 peers do not quantise it at all

    @property
    def op(self) -> str:
        return "fused_experts" + ("_shared" * self.shared)

    def work(self):
        return roofline.fused_experts(self.workload, shared=self.shared)

    def inputs(self, device):
        w = self.workload
        return SimpleNamespace(
            x=inputs.bf16(w.t, w.h, device=device),
            w13=inputs.expert_weights(w.e, 2 * w.i, w.h, device),
            w2=inputs.expert_weights(w.e, w.h, w.i, device),
            routing=routing(w, device),
            shared=(inputs.weight(2 * w.i, w.h, device), inputs.weight(w.h, w.i, device)) if self.shared else None,
        )

    def ours(self, x, impl) -> Call:
        return lambda: ds.fused_experts(x.x, x.w13, x.w2, x.routing, shared=x.shared, impl=impl)

    def _tokens(self) -> list[int]:
        t = self.workload.t
        return sorted({i * (t - 1) // max(1, CHECKED_TOKENS - 1) for i in range(CHECKED_TOKENS)})

    def part(self, x):
        """A few tokens, and the experts that they chose."""
        tokens = torch.tensor(self._tokens(), device=x.x.device)
        used, experts = x.routing.experts[tokens].unique(return_inverse=True)
        load = torch.bincount(experts.flatten(), minlength=len(used)).int()
        chosen = Routing(x.routing.weights[tokens], experts.int(), load, x.routing.nonfinite)
        w13, w2 = _choose(x.w13, used), _choose(x.w2, used)
        return SimpleNamespace(x=x.x[tokens], w13=w13, w2=w2, routing=chosen, shared=x.shared)

    def part_of_output(self, out, x):
        return out[self._tokens()]

    def peers(self, x):
        if self.shared:  # the peers do not compute shared experts
            return {}

        @functools.cache
        def weights() -> tuple[Tensor, Tensor]:
            """In bf16, 22 GB: one copy for all peers."""
            return peers.in_bf16(x.w13), peers.in_bf16(x.w2)

        return {
            "grouped_mm": lambda: moe_peers.grouped_mm_experts(x.x, *weights(), x.routing),
            "transformers": lambda: moe_peers.transformers_experts(x.x, *weights(), x.routing),
            "vllm": lambda: moe_peers.vllm_experts(x.x, x.w13, x.w2, x.routing),
        }


@dataclass(frozen=True)
class ExpertProducts(Case):
    """Only the two grouped products of the block, in fp8: the yardstick for `fused_experts`."""

    workload: workloads.Moe

    @property
    def op(self) -> str:
        return "expert_products"

    def work(self):
        return roofline.expert_products(self.workload)

    def inputs(self, device):
        w = self.workload
        load = routing(w, device).load
        return SimpleNamespace(
            a=inputs.activation(w.t * w.k, w.h, device),
            hidden=inputs.activation(w.t * w.k, w.i, device),
            w13=inputs.expert_weights(w.e, 2 * w.i, w.h, device),
            w2=inputs.expert_weights(w.e, w.h, w.i, device),
            offsets=torch.nn.functional.pad(load.cumsum(0), (1, 0)).int(),
        )

    def ours(self, x, impl) -> Call:
        def products():
            gate_up = ds.grouped_gemm(x.a, x.w13, x.offsets, impl=impl)
            return gate_up, ds.grouped_gemm(x.hidden, x.w2, x.offsets, impl=impl)

        return products

    def part(self, x):
        """The last expert."""
        first, end = x.offsets[-2:].tolist()
        rows = (Fp8Tensor(a.data[first:end], a.scale[first:end]) for a in (x.a, x.hidden))
        last = torch.tensor([self.workload.e - 1], device=x.offsets.device)
        a, hidden = rows
        offsets = torch.tensor([0, end - first], dtype=torch.int32, device=x.offsets.device)
        return SimpleNamespace(a=a, hidden=hidden, w13=_choose(x.w13, last), w2=_choose(x.w2, last), offsets=offsets)

    def part_of_output(self, out, x):
        first, end = x.offsets[-2:].tolist()
        return tuple(y[first:end] for y in out)


@dataclass(frozen=True)
class FusedExpertsTraining(Case):
    """`fused_experts` on bf16 weights, forward and backward, its products in bf16 or in fp8."""

    workload: workloads.Moe
    fp8: bool = False
    peer_tolerance = 1e-2

    @property
    def tolerance(self) -> float:  # type: ignore[override]
        """In fp8, operands are quantised after roundings that differ; in bf16 a few roundings follow each other."""
        # The kernels round to e4m3 before the routing weights are applied, the reference does after: 1.2e-3 on an H100.
        return 2e-3 if self.fp8 else 3e-5

    @property
    def op(self) -> str:
        return "fused_experts_training" + ("_fp8" * self.fp8)

    def work(self):
        return roofline.fused_experts_training(self.workload, fp8=self.fp8)

    def inputs(self, device):
        w = self.workload
        return SimpleNamespace(
            x=inputs.bf16(w.t, w.h, device=device).requires_grad_(),
            w13=inputs.bf16(w.e, 2 * w.i, w.h, device=device, scale=w.h**-0.5).requires_grad_(),
            w2=inputs.bf16(w.e, w.h, w.i, device=device, scale=w.i**-0.5).requires_grad_(),
            routing=routing(w, device),
            dy=inputs.bf16(w.t, w.h, device=device),
        )

    def ours(self, x, impl) -> Call:
        call = self.forward(x, impl)

        def step():
            y = call()
            return y.detach(), *torch.autograd.grad(y, (x.x, x.w13, x.w2), x.dy)

        return step

    def forward(self, x, impl) -> Call:
        return lambda: ds.fused_experts(x.x, x.w13, x.w2, x.routing, fp8=self.fp8, impl=impl)

    def peers(self, x):
        def prepare():
            run = moe_peers.grouped_mm_experts(x.x, x.w13, x.w2, x.routing).run

            def step():
                y = run()
                return y.detach(), *torch.autograd.grad(y, (x.x, x.w13, x.w2), x.dy)

            return peers.Peer(step)

        return {"grouped_mm": prepare}


def _choose(stack: Fp8Tensor, experts: torch.Tensor) -> Fp8Tensor:
    data = stack.data.view(torch.uint8)[experts].view(torch.float8_e4m3fn)  # indexing does not support fp8
    return Fp8Tensor(data, stack.scale[experts], stack.block)


CASES: list[Case] = [
    *(Permute(w) for w in workloads.PERMUTES),
    *(Combine(w) for w in workloads.PERMUTES),
    *(FusedExperts(w) for w in workloads.EXPERT_BLOCKS),
    *(FusedExperts(w, shared=True) for w in workloads.SHARED_EXPERT_BLOCKS),
    *(ExpertProducts(w) for w in workloads.EXPERT_BLOCKS),
    *(FusedExpertsTraining(w, fp8) for w in workloads.EXPERT_TRAINING for fp8 in (False, True)),
]
