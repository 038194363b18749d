"""Hugging Face's DeepseekV3 on our weights, dequantised to bf16, as a peer of whole passes."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import kept_within_a_family
from benchmarks.models import Inputs
from benchmarks.peers import NotApplicable, Peer
from dskernels import Fp8Tensor
from dskernels.model import DeepseekV3
from dskernels.model.layers import FP8_BLOCK


def transformers_decode(x: Inputs) -> Peer:
    """A step over its own cache, which holds latents too, and writes keys and values out at every step."""
    model = _transformers_model(x.model)
    cache_utils = importlib.import_module("transformers.cache_utils")
    cache, before = cache_utils.DynamicCache(), int(x.lengths[0]) - 1
    rank = x.model.config.kv_lora_rank
    for layer, pages in enumerate(x.cache.data):
        rows = pages[x.table.long()].flatten(1, 2)[:, None, :before]
        # It moves the pairs of a rotated key into halves.
        halves = torch.cat((rows[..., rank::2], rows[..., rank + 1 :: 2]), -1)
        cache.update(rows[..., :rank].contiguous(), halves, layer)
    tokens = x.tokens[:, None]
    positions = torch.full_like(tokens, before)

    @torch.no_grad()
    def step() -> Tensor:
        if cache.get_seq_length() > before:
            cache.crop(before)  # what the last call added
        out = model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
        return out.logits[:, -1]

    return Peer(step)


def transformers_prefill(x: Inputs) -> Peer:
    """A prompt, its latents kept in a cache, the head for the last token."""
    model = _transformers_model(x.model)
    tokens = x.tokens[None]

    @torch.no_grad()
    def prompt() -> Tensor:
        return model(input_ids=tokens, use_cache=True, logits_to_keep=1).logits[:, -1]

    return Peer(prompt)


@kept_within_a_family  # with ours, which is its key: 73 GiB
def _transformers_model(ours: DeepseekV3) -> Any:
    """Their model in bf16, with SDPA and the grouped products of torch for its experts."""
    transformers = importlib.import_module("transformers")
    config = ours.config
    if config.scoring_func != "sigmoid":
        raise NotApplicable("the V2 models are another class")
    theirs_config = transformers.DeepseekV3Config(**config.to_hf())
    device, dtype = ours.embed_tokens.weight.device, torch.bfloat16
    with torch.device("meta"):
        attention = "sdpa"
        model = transformers.AutoModelForCausalLM.from_config(
            theirs_config, dtype=dtype, attn_implementation=attention, experts_implementation="grouped_mm"
        )
    model.to_empty(device=device).eval().requires_grad_(False)
    given = dict(_tensors(ours))
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("inv_freq"):  # its halves of a turn are ours
                tensor.copy_(ours.rope.frequencies)
            else:
                _fill(tensor, given.pop(name))
    if given:
        raise NotApplicable(f"its model has no {next(iter(given))}")
    return model


def _fill(theirs: Tensor, ours: Tensor | Fp8Tensor | list[Fp8Tensor]) -> None:
    if isinstance(ours, list):  # experts one by one: dequantised they are in fp32 first
        for part, expert in zip(theirs, ours, strict=True):
            part.copy_(expert.dequantize(theirs.dtype))
    else:
        theirs.copy_(ours.dequantize(theirs.dtype) if isinstance(ours, Fp8Tensor) else ours)


def _tensors(ours: Any) -> Any:
    """Their names, and the weights of our model, whose blocks are modules to torch, no more."""
    config = ours.config
    yield "model.embed_tokens.weight", ours.embed_tokens.weight
    yield "model.norm.weight", ours.norm.weight
    yield "lm_head.weight", ours.lm_head.weight
    for i, block in enumerate(ours.layers):
        prefix, attention, mlp = f"model.layers.{i}", block.self_attn, block.mlp
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", getattr(block, name).weight
        query = ("q_proj",) if config.q_lora_rank is None else ("q_a_proj", "q_b_proj", "q_a_layernorm")
        for name in (*query, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "kv_a_layernorm"):
            module = getattr(attention, name)
            if module is not None:
                yield f"{prefix}.self_attn.{name}.weight", getattr(module, "operand", module.weight)
        if attention.qkv_a_proj is not None:
            both = attention.qkv_a_proj.operand.dequantize()
            yield f"{prefix}.self_attn.{query[0]}.weight", both[: -config.latent_dim]
            yield f"{prefix}.self_attn.kv_a_proj_with_mqa.weight", both[-config.latent_dim :]
        if not hasattr(mlp, "experts"):
            yield from _gated(f"{prefix}.mlp", mlp.w13.operand.dequantize(), mlp.w2.operand)
            continue
        yield f"{prefix}.mlp.gate.weight", mlp.gate.weight
        yield f"{prefix}.mlp.gate.e_score_correction_bias", mlp.gate.e_score_correction_bias
        w13, w2 = (
            [Fp8Tensor(*pair, FP8_BLOCK) for pair in zip(x.data, x.scale, strict=True)] for x in mlp.experts.operands
        )
        routed = config.n_routed_experts
        yield f"{prefix}.mlp.experts.gate_up_proj", w13[:routed]
        yield f"{prefix}.mlp.experts.down_proj", w2[:routed]
        shared = f"{prefix}.mlp.shared_experts"
        if mlp.shared_experts is not None:
            yield from _gated(shared, mlp.shared_experts.w13.operand.dequantize(), mlp.shared_experts.w2.operand)
        elif mlp.experts.n_shared:
            halves = [expert.dequantize().chunk(2) for expert in w13[routed:]]
            both = torch.cat([*(gate for gate, _ in halves), *(up for _, up in halves)])
            yield from _gated(shared, both, torch.cat([expert.dequantize() for expert in w2[routed:]], 1))


def _gated(prefix: str, w13: Tensor, w2: Tensor | Fp8Tensor) -> Any:
    gate, up = w13.chunk(2)
    yield from (
        (f"{prefix}.gate_proj.weight", gate),
        (f"{prefix}.up_proj.weight", up),
        (f"{prefix}.down_proj.weight", w2),
    )
