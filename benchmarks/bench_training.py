"""A training step of a slice of a model: forward, losses and backward, compared with the same model under
torch.compile.

Ours is a CUDA graph, as in `dskernels train`; the peer is timed both as Python launches it and as a graph. They run in
turns. Run this in a separate process, alone on its GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import dskernels as ds
from benchmarks import models, workloads
from benchmarks.cases import Call, Case, kept_within_a_family, under
from benchmarks.peers import Peer
from benchmarks.peers import training as training_peers
from benchmarks.roofline import BF16, Work
from dskernels.model import Config, DeepseekV3, targets

ALPHA = 1e-4  # of the balance loss
CHECKED_TOKENS = 256  # of the first sequence: their results do not depend on the tokens after them


@dataclass(frozen=True)
class Inputs:
    """A model, and packed sequences of one length."""

    model: DeepseekV3
    tokens: Tensor
    batch: int
    alpha: float

    @property
    def cu_seqlens(self) -> Tensor:
        """Where each sequence begins, and the end."""
        steps = torch.arange(self.batch + 1, device=self.tokens.device)
        return (steps * (self.tokens.shape[0] // self.batch)).int()

    @functools.cached_property
    def targets(self) -> Tensor:
        """What each row has to predict."""
        return targets(self.tokens, self.cu_seqlens)

    @property
    def counted(self) -> int:
        """How many tokens have a next one."""
        return self.tokens.shape[0] - self.batch

    def step(self) -> Tensor:
        """The loss of each token in nats; leaves gradients in the parameters. Weights count as changed since the
        last call."""
        model, parameters = self.model, list(self.model.parameters())
        for parameter in parameters:
            parameter.grad = None
            torch.autograd.graph.increment_version(parameter)
        cu_seqlens = self.cu_seqlens
        output = model(self.tokens, cu_seqlens)
        nats = ds.cross_entropy(output.logits, self.targets)
        loss = nats.sum() / self.counted
        for router in output.routers:
            loss = loss + ds.balance_loss(
                router.logits,
                top_k=model.config.num_experts_per_tok,
                alpha=self.alpha,
                sequence_lengths=cu_seqlens.diff(),
                score=model.config.scoring_func,
            )
        loss.backward()
        return nats.detach()


@kept_within_a_family
def _weights(name: str, device: torch.device) -> DeepseekV3:
    return DeepseekV3(models.config_of(name), device=device, dtype=torch.bfloat16)


def model_of(name: str, device: torch.device, *, fp8: bool, recompute: bool) -> DeepseekV3:
    """A fresh model; models of the same name share their weights."""
    weights = _weights(name, device)
    model = DeepseekV3(weights.config, fp8=fp8, recompute=recompute, device="meta", dtype=torch.bfloat16)
    model.load_state_dict(weights.state_dict(), assign=True)
    model.rope.to_empty(device=device)
    return model


@dataclass(frozen=True)
class TrainingStep(Case):
    """Forward, losses and backward. In e4m3, weights are quantised once per step, as after an optimiser's update."""

    workload: workloads.Training
    fp8: bool = True
    recompute: bool = False
    tolerance = 1e-3  # of nats
    peer_tolerance = 1e-3
    rounds = 12  # five runs of a step launched by Python took 61.1 to 68.6 ms

    @property
    def op(self) -> str:
        return "training_step_" + ("fp8" if self.fp8 else "bf16") + "_recompute" * self.recompute

    def work(self):
        config = models.config_of(self.workload.model)
        # Weights are read forward and backward, and their gradients written.
        return Work(step_flops(config, self.workload), 3 * BF16 * config.parameter_count().total, "bf16")

    def inputs(self, device):
        w = self.workload
        model = model_of(w.model, device, fp8=self.fp8, recompute=self.recompute)
        return Inputs(model, torch.randint(0, model.config.vocab_size, (w.b * w.s,), device=device), w.b, ALPHA)

    def part(self, x):
        tokens = min(CHECKED_TOKENS, self.workload.s)
        return Inputs(x.model, x.tokens[:tokens], 1, ALPHA)

    def part_of_output(self, out, x):
        return out[: min(CHECKED_TOKENS, self.workload.s) - 1]

    def comparable(self, out):
        return out[: min(CHECKED_TOKENS, self.workload.s) - 1]

    def ours(self, x, impl) -> Call:
        if impl == "reference" or not x.tokens.is_cuda:
            return under(impl, x.step)
        # Separate parameters: others may still be referenced by what ran on another stream, and would be captured with
        # it.
        model = model_of(self.workload.model, x.tokens.device, fp8=self.fp8, recompute=self.recompute)
        return models.graph_of(under(impl, replace(x, model=model).step))

    def forward(self, x, impl) -> Call:
        return under(impl, lambda: x.model(x.tokens, x.cu_seqlens))

    def peers(self, x) -> dict[str, Callable[[], Peer]]:
        # The weights that the models share are a bf16 model.
        weights = functools.partial(_weights, self.workload.model, x.tokens.device)
        peers = {"torch_compile": lambda: training_peers.torch_step(weights(), x)}
        if x.tokens.is_cuda:
            peers["torch_compile_graph"] = lambda: Peer(models.graph_of(training_peers.torch_step(weights(), x).run))
        return peers


def step_flops(config: Config, w: workloads.Training) -> int:
    """Operations of the matrix products in a step: the forward, and twice that for the backward, without recomputation.

    Causal attention counts half of the square. Embedding and norms have no products.
    """
    weights = config.parameter_count().active
    pairs = w.s * (w.s + 1) // 2
    width = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 3 * w.b * (2 * w.s * weights + config.num_hidden_layers * 2 * pairs * width)


HOW = ((True, True), (True, False), (False, False))  # e4m3, recomputation
CASES: list[Case] = [TrainingStep(w, fp8, recompute) for w in workloads.TRAININGS for fp8, recompute in HOW]
