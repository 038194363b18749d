"""The mixture of experts: the router, the experts, and the block that contains both and the shared experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dskernels as ds
from dskernels.integrations.transformers.patches import STATE
from dskernels.integrations.transformers.weights import (
    Copy,
    Weight,
    fp8_weight,
    is_linear,
    one_below_the_other,
    weight_of,
)
from dskernels.types import Fp8Tensor, Routing


@dataclass
class RouterState:
    """Options of `dskernels.route_hidden`; `narrow` if the experts that follow take fp32 weights and int32 ids."""

    options: dict[str, Any]
    narrow: bool = False


@dataclass
class BlockState:
    """State of a block with shared experts: whether to multiply in e4m3, and copies of the shared experts' weights."""

    fp8: bool
    w13: Copy = field(default_factory=Copy)
    w2: Copy = field(default_factory=Copy)


def router_forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in fp32, and the weights and ids of the chosen experts."""
    state: RouterState = getattr(self, STATE)
    bias = getattr(self, "e_score_correction_bias", None)
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.float()
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    routing, logits = ds.route_hidden(x, self.weight, bias, **state.options)
    if state.narrow:
        return logits, routing.weights, routing.experts
    return logits, routing.weights.to(x.dtype), routing.experts.long()


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The function that transformers' `ExpertsInterface` calls for stacked experts, plain or in e4m3."""
    return fused(self, hidden_states, top_k_index, top_k_weights, None, getattr(self, STATE, False))


def block_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Router, experts and shared experts: in one operation where the shared experts can be part of it."""
    state: BlockState = getattr(self, STATE)
    _, weights, index = self.gate(hidden_states)
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    shared = _shared_weights(self, state)
    if shared is None:
        out = self.experts(x, index, weights).view(hidden_states.shape)
        return out + self.shared_experts(hidden_states)
    return fused(self.experts, x, index, weights, shared, state.fp8).view(hidden_states.shape)


def fused(
    experts: Any, x: Tensor, index: Tensor, weights: Tensor, shared: tuple[Weight, Weight] | None, fp8: bool
) -> Tensor:
    """`dskernels.fused_experts`, applied to the weights of a transformers module."""
    w13, w2 = _operands(experts)
    dtype = x.dtype
    if not isinstance(w13, Fp8Tensor):
        x = x.to(w13.dtype)  # under autocast the input may be wider than the weights
    routing = Routing(weights.float(), index, index, index)
    return ds.fused_experts(x.contiguous(), w13, w2, routing, shared=shared, fp8=fp8).to(dtype)


def _operands(experts: Any) -> tuple[Weight, Weight]:
    up, down = experts.gate_up_proj, experts.down_proj
    if up.dtype != torch.float8_e4m3fn:
        return up, down
    return fp8_weight(up, experts.gate_up_proj_scale_inv), fp8_weight(down, experts.down_proj_scale_inv)


def _shared_weights(block: Any, state: BlockState) -> tuple[Weight, Weight] | None:
    """w13 and w2 of the shared experts; None if they have to be called as modules."""
    shared = block.shared_experts
    layers = shared.gate_proj, shared.up_proj, shared.down_proj
    if not all(is_linear(layer) and layer.bias is None for layer in layers) or hasattr(shared, "_hf_hook"):
        return None
    if shared._forward_hooks or shared._forward_pre_hooks:
        return None
    in_fp8 = block.experts.gate_up_proj.dtype == torch.float8_e4m3fn
    if in_fp8 != isinstance(weight_of(layers[2]), Fp8Tensor):
        return None
    learns = torch.is_grad_enabled() and layers[2].weight.requires_grad
    w13 = one_below_the_other(layers[0], layers[1], state.w13, state.fp8 and not learns)
    if w13 is None:
        return None
    w2 = weight_of(layers[2])
    if isinstance(w13, Fp8Tensor) and not isinstance(w2, Fp8Tensor):
        w2 = state.w2.of((layers[2].weight,), lambda: ds.quantize(layers[2].weight, (128, 128)))
    return w13, w2
