"""The loss: nats of each token's target from bf16 logits, and their gradient. Bound by memory."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import dskernels as ds
from benchmarks import inputs, peers, roofline, workloads
from benchmarks.cases import Call, Case
from benchmarks.peers import Peer

CHECKED_ROWS = 256  # rows are independent of each other; the reference converts whole matrices to fp32

COMPILED = 100_000  # number of columns from which on torch.compile is timed too


def torch_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The same in PyTorch, from logits in fp32."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


@dataclass(frozen=True)
class CrossEntropy(Case):
    """`cross_entropy` of `m` tokens over `n` columns."""

    workload: workloads.Rows

    @property
    def op(self) -> str:
        return "cross_entropy"

    def work(self):
        return roofline.cross_entropy(self.workload)

    def inputs(self, device):
        w = self.workload
        logits = inputs.bf16(w.m, w.n, device=device, scale=4.0)
        targets = torch.randint(0, w.n, (w.m,), device=device)
        return SimpleNamespace(logits=logits, targets=targets, d_nats=torch.rand(w.m, device=device))

    def part(self, x):
        return SimpleNamespace(**{name: value[:CHECKED_ROWS] for name, value in vars(x).items()})

    def part_of_output(self, out, x):
        return out[:CHECKED_ROWS]

    def ours(self, x, impl) -> Call:
        return lambda: ds.cross_entropy(x.logits, x.targets, impl=impl)

    def forward(self, x, impl) -> Call:
        return CrossEntropy.ours(self, x, impl)

    def peers(self, x):
        found = {"torch": peers.eager(lambda: torch_nats(x.logits, x.targets))}
        if x.logits.is_cuda and self.workload.n >= COMPILED:  # a CPU takes 5 to 20 s to compile a pass
            found["torch_compile"] = peers.compiled(torch_nats, x.logits, x.targets)
        return found


@dataclass(frozen=True)
class CrossEntropyBackward(CrossEntropy):
    """The gradient of the logits, given the gradient of the losses."""

    @property
    def op(self) -> str:
        return "cross_entropy_backward"

    def work(self):
        return roofline.cross_entropy_backward(self.workload)

    def ours(self, x, impl) -> Call:
        logits = x.logits.detach().requires_grad_()
        nats = ds.cross_entropy(logits, x.targets, impl=impl)
        return _gradient(nats, logits, x.d_nats)

    def peers(self, x):
        def prepare(function):
            logits = x.logits.detach().requires_grad_()
            return Peer(_gradient(function(logits, x.targets), logits, x.d_nats))

        found = {"torch": lambda: prepare(torch_nats)}
        if x.logits.is_cuda and self.workload.n >= COMPILED:
            found["torch_compile"] = lambda: prepare(torch.compile(torch_nats, dynamic=False))
        return found


def _gradient(nats: Tensor, logits: Tensor, d_nats: Tensor) -> Call:
    return lambda: torch.autograd.grad(nats, logits, d_nats, retain_graph=True)[0]


CASES: list[Case] = [kind(w) for kind in (CrossEntropy, CrossEntropyBackward) for w in workloads.LOGITS]
