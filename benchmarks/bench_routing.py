"""Choosing experts and keeping their load even. Bound by memory, and for small batches by the launch.

A launch alone takes longer than most of these calls, so `route` is also timed as a model runs it, in a CUDA graph: the
rows ``route_in_graph`` are this many calls, one after the other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace

import torch

import dskernels as ds
from benchmarks import peers, roofline, workloads
from benchmarks.cases import Call, Case
from benchmarks.models import graph_of
from benchmarks.peers import moe as moe_peers
from dskernels.choice import OPERATIONS

SCALE = 2.5
COMPILED = (4096, 32768)  # tokens


@dataclass(frozen=True)
class Route(Case):
    """`route`, from fp32 logits to weights, ids and loads."""

    workload: workloads.Route
    tolerance = 1e-4  # two scores closer than an ulp may change places: one choice in ten thousand

    @property
    def op(self) -> str:
        return "route"

    def work(self):
        return roofline.route(self.workload)

    def inputs(self, device):
        w = self.workload
        logits = torch.randn(w.t, w.e, device=device)
        bias = torch.randn(w.e, device=device) * 0.01 if w.score == "sigmoid" else None
        return SimpleNamespace(logits=logits, bias=bias, d_weights=torch.randn(w.t, w.k, device=device))

    @property
    def _options(self):
        w = self.workload
        scale = SCALE if w.score == "sigmoid" else 1.0
        return {"top_k": w.k, "n_groups": w.g, "top_groups": w.top_groups, "score": w.score, "scale": scale}

    def ours(self, x, impl) -> Call:
        return lambda: ds.route(x.logits, x.bias, **self._options, impl=impl)

    def forward(self, x, impl) -> Call:
        return Route.ours(self, x, impl)

    def comparable(self, out):
        """The weights, ordered by expert: the order of two equal ones means nothing."""
        weights, experts = out[0], out[1]
        table = torch.zeros(len(weights), self.workload.e, device=weights.device)
        return table.scatter(1, experts.long(), weights.float())

    def peers(self, x):
        w = self.workload
        if w.score != "sigmoid":
            return {}
        job = (x.logits, x.bias, w.k, w.g, w.top_groups, SCALE)
        found = {"torch": peers.eager(lambda: moe_peers.eager_route(*job))}
        if w.t in COMPILED:
            found["torch_compile"] = peers.compiled(moe_peers.eager_route, *job)
        found["flashinfer"] = lambda: moe_peers.flashinfer_route(*job)
        found["vllm"] = lambda: moe_peers.vllm_route(*job)
        return found


@dataclass(frozen=True)
class RouteBackward(Route):
    """The gradient of the logits, given the gradient of the weights."""

    tolerance = 1e-4

    @property
    def op(self) -> str:
        return "route_backward"

    def work(self):
        return roofline.route_backward(self.workload)

    def ours(self, x, impl) -> Call:
        logits = x.logits.detach().requires_grad_()
        weights = ds.route(logits, x.bias, **self._options, impl=impl).weights
        return lambda: torch.autograd.grad(weights, logits, x.d_weights, retain_graph=True)

    def comparable(self, out):
        return out

    def peers(self, x):
        def prepare():
            w = self.workload
            logits = x.logits.detach().requires_grad_()
            weights, _ = moe_peers.eager_route(logits, x.bias, w.k, w.g, w.top_groups, SCALE)
            return peers.Peer(lambda: torch.autograd.grad(weights, logits, x.d_weights, retain_graph=True))

        return {"torch": prepare}


@dataclass(frozen=True)
class Replayed(workloads.Route):
    """`calls` calls in one CUDA graph, each with its own inputs."""

    calls: int = 20

    @property
    def name(self) -> str:
        return f"{self.calls}x_{super().name}"


class InGraph(Case):
    """The calls of a `Replayed` workload; the reference computes the first."""

    workload: Replayed

    @property
    def op(self) -> str:
        return f"{super().op}_in_graph"

    def work(self):
        return roofline.Work(None, self.workload.calls * super().work().bytes)

    def inputs(self, device):
        each = super().inputs
        return [each(device) for _ in range(self.workload.calls)]

    def part(self, x):
        return x[:1]

    def part_of_output(self, out, x):
        return out[:1]

    def comparable(self, out):
        each = super().comparable
        return [each(one) for one in out]

    def calls(self, x, impl) -> list[Call]:
        """A call for each of the inputs."""
        each = super().ours
        return [each(one, impl) for one in x]

    def ours(self, x, impl) -> Call:
        calls = self.calls(x, impl)

        def run():
            return [call() for call in calls]

        return graph_of(run) if x[0].logits.is_cuda and impl != "reference" else run

    def forward(self, x, impl) -> Call:
        return super().forward(x[0], impl)

    def peers(self, x):
        return {}


class RouteInGraph(InGraph, Route):
    """`route`, replayed."""


class RouteBackwardInGraph(InGraph, RouteBackward):
    """Its gradient, replayed: the registered operation, since autograd's own work is not part of the graph."""

    def calls(self, x, impl) -> list[Call]:
        backward = OPERATIONS["route_backward"]
        calls: list[Call] = []
        for one in x:
            routed = ds.route(one.logits, one.bias, **self._options, impl=impl)
            given = one.d_weights, one.logits, routed.weights, routed.experts
            calls.append(functools.partial(backward, *given, False, True, SCALE, impl=impl))
        return calls


@dataclass(frozen=True)
class RouteHidden(Case):
    """`route_hidden`, from bf16 hidden states and gate weights."""

    workload: workloads.RouteHidden
    tolerance = 1e-4  # as of `Route`

    @property
    def op(self) -> str:
        return "route_hidden"

    def work(self):
        return roofline.route_hidden(self.workload)

    def inputs(self, device):
        w = self.workload
        return SimpleNamespace(
            x=torch.randn(w.t, w.h, device=device).bfloat16(),
            weight=(torch.randn(w.e, w.h, device=device) * w.h**-0.5).bfloat16(),
            bias=torch.randn(w.e, device=device) * 0.01,
        )

    def ours(self, x, impl) -> Call:
        w = self.workload
        return lambda: ds.route_hidden(
            x.x, x.weight, x.bias, top_k=w.k, n_groups=w.g, top_groups=w.top_groups, scale=SCALE, impl=impl
        )

    def comparable(self, out):
        """The weights, ordered by expert, and the logits."""
        routing, logits = out
        table = torch.zeros_like(logits)
        return table.scatter(1, routing.experts.long(), routing.weights), logits

    def comparable_peer(self, out):
        return self.comparable(out if isinstance(out[0], ds.Routing) else (ds.Routing(*out[:2], *out[:2]), out[2]))

    def peers(self, x):
        def prepare():
            w = self.workload

            def run():
                logits = x.x.float() @ x.weight.float().T
                return *moe_peers.eager_route(logits, x.bias, w.k, w.g, w.top_groups, SCALE), logits

            return peers.Peer(run)

        return {"torch": prepare}


@dataclass(frozen=True)
class BalanceLoss(Case):
    """`balance_loss` over four packed sequences."""

    workload: workloads.Route

    @property
    def op(self) -> str:
        return "balance_loss"

    def work(self):
        return roofline.balance_loss(self.workload)

    def inputs(self, device):
        w = self.workload
        lengths = torch.full((4,), w.t // 4, dtype=torch.int32, device=device)
        return SimpleNamespace(logits=torch.randn(w.t, w.e, device=device), lengths=lengths)

    def ours(self, x, impl) -> Call:
        options = {"top_k": self.workload.k, "alpha": 1e-4, "sequence_lengths": x.lengths}
        return lambda: ds.balance_loss(x.logits, **options, impl=impl)


@dataclass(frozen=True)
class UpdateBias(Case):
    """`update_bias`, in place."""

    workload: workloads.Route

    @property
    def op(self) -> str:
        return "update_bias"

    def work(self):
        return roofline.update_bias(self.workload)

    def inputs(self, device):
        e = self.workload.e
        return SimpleNamespace(
            bias=torch.randn(e, device=device), load=torch.randint(0, 1000, (e,), dtype=torch.int32, device=device)
        )

    def ours(self, x, impl) -> Call:
        bias = x.bias.clone()  # each caller updates its own
        return lambda: ds.update_bias(bias, x.load, 1e-3, impl=impl)


CASES: list[Case] = [
    *(Route(w) for w in workloads.ROUTES),
    *(RouteBackward(w) for w in workloads.ROUTE_GRADIENTS),
    *(RouteInGraph(Replayed(t)) for t in (1, 128, 4096, 8192, 32768)),
    *(RouteBackwardInGraph(Replayed(t)) for t in (128, 4096, 8192, 32768)),
    *(RouteHidden(w) for w in workloads.ROUTES_HIDDEN),
    BalanceLoss(workloads.Route(4096)),
    UpdateBias(workloads.Route(4096)),
]
