"""A model of Hugging Face transformers, accelerated by one line, compared with itself unchanged: a prompt and a decode
step.

The model is DeepSeek-V3's at half of its dimensions, one dense layer and three of 256 experts, with random weights. Its
weights are stored in bf16, and multiplied in bf16 or, quantised once, in e4m3.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import model_roofline, workloads
from benchmarks.cases import Call, Case, kept_within_a_family, under
from benchmarks.models import DAMPING
from benchmarks.peers import NotApplicable, Peer
from benchmarks.roofline import Chain
from dskernels.model import Config

HALF = {
    "vocab_size": 64640,
    "hidden_size": 3584,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_attention_heads": 64,
    "q_lora_rank": 768,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}


def config_of(name: str) -> Config:
    """The shape that a workload names."""
    if name == workloads.MODEL_V3_HALF:
        return Config.from_name("deepseek-v3", **HALF)
    return Config.from_name("tiny", num_hidden_layers=2, vocab_size=64, num_nextn_predict_layers=0)


@kept_within_a_family
def models_of(name: str, device: torch.device) -> tuple[Any, Any, Any]:
    """The unchanged model and two accelerated ones, in bf16 and in e4m3; all share their weights."""
    if importlib.util.find_spec("transformers") is None:
        raise NotApplicable("transformers is not installed")
    plain = _model(name, device)
    with torch.no_grad():
        for key, parameter in plain.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                adds = DAMPING if key.endswith(("o_proj.weight", "down_proj", "down_proj.weight")) else 1.0
                spread = 1.0 if "embed" in key else adds * parameter.shape[-1] ** -0.5
                parameter.normal_(0.0, spread)
        for key, buffer in plain.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.zero_()
    accelerate = importlib.import_module("dskernels.integrations.transformers").accelerate
    ours = []
    for fp8 in (False, True):
        model = _model(name, "meta")
        model.load_state_dict(plain.state_dict(), assign=True)
        for (_, theirs), (_, module) in zip(plain.named_modules(), model.named_modules(), strict=True):
            for key, buffer in theirs.named_buffers(recurse=False):
                module.register_buffer(key, buffer, persistent=key in theirs.state_dict())
        accelerate(model.requires_grad_(False), fp8=fp8, verbose=False)
        ours.append(model)
    return plain, *ours


def _model(name: str, device: torch.device | str) -> Any:
    transformers = importlib.import_module("transformers")
    config = transformers.DeepseekV3Config(**config_of(name).to_hf())
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Inputs:
    """Models that share their weights, tokens ``[B, S]``, and for a decode step how many are cached before them."""

    models: tuple[Any, Any, Any]
    tokens: Tensor
    cached: int = 0

    @torch.no_grad()
    def prompt(self, model: Any) -> Tensor:
        """All tokens, the cache they fill, and the logits after the last."""
        return model(input_ids=self.tokens, use_cache=True, logits_to_keep=1).logits[:, -1]

    def step(self, model: Any) -> Call:
        """One new token of each request after the cached ones; it is dropped again at the next call."""
        cache = importlib.import_module("transformers").DynamicCache()
        config, batch = model.config, self.tokens.shape[0]
        generator = torch.Generator(self.tokens.device).manual_seed(0)
        for layer in range(config.num_hidden_layers):
            rows = [
                torch.randn(
                    batch, 1, self.cached, width, generator=generator, device=self.tokens.device, dtype=model.dtype
                )
                for width in (config.kv_lora_rank, config.qk_rope_head_dim)
            ]
            cache.update(*rows, layer)
        positions = torch.full_like(self.tokens, self.cached)

        @torch.no_grad()
        def step() -> Tensor:
            if cache.get_seq_length() > self.cached:
                cache.crop(-1)
            out = model(input_ids=self.tokens, position_ids=positions, past_key_values=cache, use_cache=True)
            return out.logits[:, -1]

        return step


@dataclass(frozen=True)
class TransformersPrefill(Case):
    """A prompt through `model(...)`, the cache included."""

    workload: workloads.ModelPrefill
    fp8: bool
    peer_tolerance = 3e-2  # the peer does not quantise

    @property
    def tolerance(self) -> float:  # type: ignore[override]
        """For logits: a rounding may change a choice of experts, see `bench_model`."""
        return 1e-3 * config_of(self.workload.model).num_hidden_layers

    @property
    def op(self) -> str:
        return "transformers_prefill_" + ("fp8" if self.fp8 else "bf16")

    def work(self) -> Chain:
        """The products in e4m3, which are the floor whatever precision is used."""
        return model_roofline.prefill(config_of(self.workload.model), self.workload)

    def inputs(self, device):
        models = models_of(self.workload.model, device)
        return Inputs(models, torch.randint(0, models[0].config.vocab_size, (1, self.workload.s), device=device))

    def ours(self, x, impl) -> Call:
        return under(impl, lambda: x.prompt(x.models[1 + self.fp8]))

    def peers(self, x) -> dict[str, Callable[[], Peer]]:
        return {"transformers": lambda: Peer(lambda: x.prompt(x.models[0]))}


@dataclass(frozen=True)
class TransformersDecode(Case):
    """A decode step through `model(...)` over a `DynamicCache`."""

    workload: workloads.ModelDecode
    fp8: bool
    peer_tolerance = 3e-2

    @property
    def tolerance(self) -> float:  # type: ignore[override]
        """For logits: a rounding may change a choice of experts, see `bench_model`."""
        return 1e-3 * config_of(self.workload.model).num_hidden_layers

    @property
    def op(self) -> str:
        return "transformers_decode_" + ("fp8" if self.fp8 else "bf16")

    def work(self) -> Chain:
        """The products in e4m3, which are the floor whatever precision is used."""
        return model_roofline.decode_step(config_of(self.workload.model), self.workload)

    def inputs(self, device):
        models = models_of(self.workload.model, device)
        tokens = torch.randint(0, models[0].config.vocab_size, (self.workload.b, 1), device=device)
        return Inputs(models, tokens, self.workload.s - 1)

    def ours(self, x, impl) -> Call:
        return under(impl, x.step(x.models[1 + self.fp8]))

    def peers(self, x) -> dict[str, Callable[[], Peer]]:
        return {"transformers": lambda: Peer(x.step(x.models[0]))}


CASES: list[Case] = [
    *(TransformersPrefill(workloads.TRANSFORMERS_PREFILL, fp8) for fp8 in (False, True)),
    *(TransformersDecode(workloads.TRANSFORMERS_DECODE, fp8) for fp8 in (False, True)),
]
