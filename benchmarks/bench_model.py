"""A decode step, in a CUDA graph, and a prompt, through a whole model with random fp8 weights."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import model_roofline, models, workloads
from benchmarks.cases import Call, Case, under
from benchmarks.peers import model as model_peers

# Each layer adds DAMPING times the stream; if all of it were wrong, the difference would be 5e-3. Sums in another order
# change roundings to e4m3 and, if two experts have nearly the same score, a choice: with noise of half an ulp of bf16
# in everything that blocks add, 27 layers of Moonlight's kind differed by 3e-3 and 4e-3, three of DeepSeek-V3's by
# 5e-5.
LAYER_TOLERANCE = 1e-3
MOST_WRITTEN_OUT = 1 << 16  # tokens
ANCHORED = (workloads.MODEL_V3_SLICE, workloads.MODEL_TINY)


@dataclass(frozen=True)
class DecodeStep(Case):
    """Layout of the batch, embedding, blocks, final norm and the head in bf16, for one new token of each sequence."""

    workload: workloads.ModelDecode
    peer_tolerance = 3e-2  # bf16 peers do not quantise activations at all

    @property
    def tolerance(self) -> float:  # type: ignore[override]
        """Of logits: `LAYER_TOLERANCE` for each layer."""
        return LAYER_TOLERANCE * models.config_of(self.workload.model).num_hidden_layers

    @property
    def op(self) -> str:
        return "decode_step"

    def work(self):
        return model_roofline.decode_step(models.config_of(self.workload.model), self.workload)

    def inputs(self, device):
        return models.Inputs.of(self.workload, device)

    def ours(self, x, impl) -> Call:
        call = self.forward(x, impl)
        return models.graph_of(call) if x.tokens.is_cuda and impl != "reference" else call

    def forward(self, x, impl) -> Call:
        return under(impl, x.decode)

    def peers(self, x):
        # At every step it expands the keys and values of everything cached: 17 GB a layer for 64 sequences of 4,096.
        w = self.workload
        if w.b * w.s > MOST_WRITTEN_OUT or w.model not in ANCHORED:
            return {}
        return {"transformers": lambda: model_peers.transformers_decode(x)}


@dataclass(frozen=True)
class Prefill(Case):
    """A prompt through all blocks, writing its latents to the cache, and the logits after its last token."""

    workload: workloads.ModelPrefill
    peer_tolerance = 3e-2

    @property
    def tolerance(self) -> float:  # type: ignore[override]
        """Of logits: `LAYER_TOLERANCE` for each layer."""
        return LAYER_TOLERANCE * models.config_of(self.workload.model).num_hidden_layers

    @property
    def op(self) -> str:
        return "prefill"

    def work(self):
        return model_roofline.prefill(models.config_of(self.workload.model), self.workload)

    def inputs(self, device):
        return models.Inputs.of(self.workload, device)

    def ours(self, x, impl) -> Call:
        return under(impl, x.prefill)

    def peers(self, x):
        return {"transformers": lambda: model_peers.transformers_prefill(x)}


_ALL = (*(DecodeStep(w) for w in workloads.MODEL_DECODES), *(Prefill(w) for w in workloads.MODEL_PREFILLS))
# One model at a time: only the last one is kept.
CASES: list[Case] = sorted(_ALL, key=lambda case: case.workload.model != workloads.MODEL_V3_SLICE)
