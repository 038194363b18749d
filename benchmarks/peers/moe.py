"""Peers of the router and of the expert block."""

from __future__ import annotations

import importlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import Peer, attribute, first_attribute, torch_grouped_mm
from dskernels import Fp8Tensor, Routing


def eager_route(
    logits: Tensor, bias: Tensor, k: int, n_groups: int, top_groups: int, scale: float
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's router as a model file would write it."""
    scores = logits.sigmoid()
    biased = scores + bias
    if n_groups > 1:
        grouped = biased.unflatten(-1, (n_groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(top_groups, dim=-1, sorted=False).indices
        kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, True)
        biased = grouped.masked_fill(~kept[..., None], -math.inf).flatten(1)
    experts = biased.topk(k, dim=-1).indices
    weights = scores.gather(1, experts)
    return weights / weights.sum(-1, keepdim=True) * scale, experts


def flashinfer_route(logits: Tensor, bias: Tensor, k: int, n_groups: int, top_groups: int, scale: float) -> Peer:
    """FlashInfer's fused router."""
    fused = attribute("flashinfer.fused_moe", "fused_topk_deepseek")
    weights = logits.new_empty(len(logits), k)
    experts = torch.empty(len(logits), k, dtype=torch.int32, device=logits.device)
    return Peer(
        lambda: fused(logits, bias, n_groups, top_groups, k, scale, weights, experts), lambda _: (weights, experts)
    )


def vllm_route(logits: Tensor, bias: Tensor, k: int, n_groups: int, top_groups: int, scale: float) -> Peer:
    """vLLM's fused router."""
    fused = first_attribute(
        "fused_grouped_topk",
        "vllm.model_executor.layers.fused_moe.router.grouped_topk_router",
        "vllm.model_executor.layers.fused_moe.fused_moe",
    )
    hidden = logits.new_empty(len(logits), 1)  # only its length is looked at
    return Peer(
        lambda: fused(
            hidden_states=hidden,
            gating_output=logits,
            topk=k,
            renormalize=True,
            e_score_correction_bias=bias,
            num_expert_group=n_groups,
            topk_group=top_groups,
            scoring_func="sigmoid",
            routed_scaling_factor=scale,
        )
    )


def grouped_mm_experts(x: Tensor, w13: Tensor, w2: Tensor, routing: Routing) -> Peer:
    """Sort by expert, two grouped products in bf16, and add up: the fastest that torch alone has."""
    product, k, n_experts = torch_grouped_mm(), routing.experts.shape[1], w13.shape[0]
    up_t, down_t = w13.transpose(1, 2), w2.transpose(1, 2)

    def run() -> Tensor:
        ids = routing.experts.flatten()
        order = ids.argsort(stable=True)
        # Not by `bincount`, which waits for the device.
        load = ids.new_zeros(n_experts).scatter_add_(0, ids.long(), torch.ones_like(ids))
        ends = load.cumsum(0).int()
        gate, up = product(x[order // k], up_t, offs=ends).chunk(2, dim=-1)
        y = product(F.silu(gate) * up, down_t, offs=ends)
        back = torch.empty_like(y)
        back[order] = y
        return (back.view(*routing.experts.shape, -1) * routing.weights[..., None]).sum(1).to(x.dtype)

    return Peer(run)


def transformers_experts(x: Tensor, w13: Tensor, w2: Tensor, routing: Routing) -> Peer:
    """The experts of Hugging Face's DeepseekV3, in bf16, on its grouped_mm path."""
    model = importlib.import_module("transformers.models.deepseek_v3.modeling_deepseek_v3")
    n_experts, h, i = w2.shape
    config = model.DeepseekV3Config(
        hidden_size=h, moe_intermediate_size=i, n_routed_experts=n_experts, num_experts_per_tok=routing.experts.shape[1]
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = model.DeepseekV3Experts(config)
    experts.gate_up_proj = torch.nn.Parameter(w13, requires_grad=False)
    experts.down_proj = torch.nn.Parameter(w2, requires_grad=False)
    ids, weights = routing.experts.long(), routing.weights.to(x.dtype)
    return Peer(lambda: experts(x, ids, weights))


def vllm_experts(x: Tensor, w13: Fp8Tensor, w2: Fp8Tensor, routing: Routing) -> Peer:
    """vLLM's fused expert block with block-scaled fp8 weights."""
    fused = attribute("vllm.model_executor.layers.fused_moe", "fused_experts")
    quantized = attribute("vllm.model_executor.layers.fused_moe.config", "fp8_w8a8_moe_quant_config")
    config = quantized(w1_scale=w13.scale, w2_scale=w2.scale, block_shape=[128, 128])
    return Peer(lambda: fused(x, w13.data, w2.data, routing.weights, routing.experts, quant_config=config))
