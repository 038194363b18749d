"""Random models of published shapes, their weights made on the device straight in fp8, and passes to be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import inputs
from benchmarks.cases import kept_within_a_family
from benchmarks.workloads import MODEL_TINY, MODEL_TRAINED_SLICE, MODEL_V3_SLICE, ModelDecode, ModelPrefill
from dskernels.model import Batch, Config, DeepseekV3, LatentCache, keep_in_fp8
from dskernels.model.fp8_weights import SCALE_SUFFIX, write_out_for_decode
from dskernels.model.steps import place

E4M3 = torch.float8_e4m3fn
SPREAD = 64.0  # of the random e4m3 values: 448 is seven times as much
# What a block adds is so much of what it takes. At 1 a random model is chaos: where a rounding turns the choice of one
# expert, logits behind 27 layers have nothing to do with each other any more (calc_diff 0.33, both of them right).
DAMPING = 0.1
POOL = (1 << 26) + 1  # random bytes of which all matrices are made, each from where the one before ended


def config_of(name: str) -> Config:
    """The shape that a workload names: a preset, or a slice of one, without its MTP module."""
    if name == MODEL_V3_SLICE:
        return Config.from_name("deepseek-v3", num_hidden_layers=3, first_k_dense_replace=1, num_nextn_predict_layers=0)
    if name == MODEL_TRAINED_SLICE:
        return Config.from_name("moonlight", num_hidden_layers=4, vocab_size=16384, bos_token_id=None, eos_token_id=())
    if name == MODEL_TINY:
        # Whole blocks of fp8, as the published shapes have them, so that transformers' matrices have the size of ours.
        whole = {"moe_intermediate_size": 128, "q_lora_rank": 128}
        return Config.from_name(name, num_hidden_layers=2, vocab_size=64, num_nextn_predict_layers=0, **whole)
    return Config.from_name(name, num_nextn_predict_layers=0)


@kept_within_a_family
def random_model(name: str, device: torch.device) -> DeepseekV3:
    """A model whose matrices keep the size of what they multiply, but for those that are added to the residual stream;
    embedding, head, routers and norms in bf16."""
    with torch.no_grad():
        model = keep_in_fp8(DeepseekV3(config_of(name), fp8=True, device="meta", dtype=torch.bfloat16))
        model.to_empty(device=device)
        buffers = dict(model.named_buffers())
        size = min(POOL, max(parameter.numel() for parameter in model.parameters()) | 1)
        pool = torch.randn(size, dtype=torch.bfloat16, device=device).mul_(SPREAD).to(E4M3).view(torch.uint8)
        used = 0
        for parameter_name, parameter in model.named_parameters():
            scale = buffers.get(parameter_name + SCALE_SUFFIX)
            if scale is not None:
                adds = parameter_name.endswith(("o_proj.weight", ".w2", ".w2.weight"))
                scale.fill_((DAMPING if adds else 1.0) * parameter.shape[-1] ** -0.5 / SPREAD)
                left = parameter.view(torch.uint8).view(-1)
                while left.numel():
                    count = min(left.numel(), size - used)
                    left[:count] = pool[used : used + count]
                    left, used = left[count:], (used + count) % size
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                spread = 1.0 if parameter_name.startswith("embed") else parameter.shape[-1] ** -0.5
                parameter.normal_(0.0, spread)
        for buffer_name, buffer in buffers.items():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.zero_()
        write_out_for_decode(model)
    return model


@dataclass(frozen=True)
class Inputs:
    """A model, the pages of its cache, and what a pass is told on the device."""

    model: DeepseekV3
    cache: LatentCache
    tokens: Tensor
    lengths: Tensor
    cached: Tensor
    active: Tensor
    drafts: Tensor
    table: Tensor

    @classmethod
    def of(cls, w: ModelDecode | ModelPrefill, device: torch.device) -> Inputs:
        """Room for every token, and whatever is there already random."""
        model = random_model(w.model, device)
        pages = w.b * w.pages
        cache = LatentCache(model.config, pages=pages, page_size=w.page, device=device)
        cache.data.normal_()
        tokens = torch.randint(0, model.config.vocab_size, (w.tokens,), device=device)
        lengths = torch.full((w.b,), w.s, dtype=torch.int32, device=device)
        drafts = tokens.new_empty(w.b, 0)
        table = inputs.block_table(w.b, w.pages, device)
        return cls(model, cache, tokens, lengths, lengths - 1, torch.ones_like(lengths), drafts, table)

    @torch.no_grad()
    def decode(self) -> Tensor:
        """A step, one new token a sequence: its layout, embedding, blocks, final norm and head; logits."""
        placed = place(self.tokens, self.drafts, self.cached, self.active, self.table, page_size=self.cache.page_size)
        # Not `placed.tokens`, which are the same: where `explain` asks what would run they are not there.
        hidden, _ = self.model.trunk(self.tokens, placed.batch(self.table), self.cache.data)
        return self.model.lm_head(hidden)

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """All tokens of one sequence, written to the cache, and the logits after the last."""
        cu_seqlens = torch.nn.functional.pad(self.lengths, (1, 0))
        batch = Batch.prompt(cu_seqlens, self.tokens.shape[0], self.table, self.cache.page_size)
        hidden, _ = self.model.trunk(self.tokens, batch, self.cache.data)
        return self.model.lm_head(hidden[-1:])


@dataclass(frozen=True, eq=False)
class Replay:
    """A CUDA graph, the result that it writes over, and the step that was captured.

    The graph has addresses alone. What of the step was there before (parameters, buffers, targets) is the step's, and
    would be let go of with it: replays would read what came there next, or memory that the driver has back.
    """

    graph: torch.cuda.CUDAGraph
    out: Tensor
    step: Callable[[], Tensor]

    def __call__(self) -> Tensor:
        """The result, once the stream is there."""
        self.graph.replay()
        return self.out


def graph_of(step: Callable[[], Tensor]) -> Replay:
    """The same work as one CUDA graph; its result is written over by every call.

    Captured on the stream that it ran on before: accumulators of gradients belong to the one that made them.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # what is compiled or allocated for ever cannot be within a capture
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = step()
    return Replay(graph, out, step)
