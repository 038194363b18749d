"""RMSNorm, and linear layers and gated networks that multiply in e4m3."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dskernels as ds
from dskernels.integrations.transformers.patches import STATE
from dskernels.integrations.transformers.weights import (
    BLOCK,
    Copy,
    is_linear,
    one_below_the_other,
    weight_of,
)
from dskernels.types import Fp8Tensor


@dataclass
class GatedState:
    """Copies of the weights of a gated network in the form in which they are multiplied."""

    w13: Copy = field(default_factory=Copy)
    w2: Copy = field(default_factory=Copy)


def linear_forward(self: Any, input: Tensor) -> Tensor:
    """Multiply in e4m3; a plain weight gets its gradients in e4m3 too, a weight stored in e4m3 gets none."""
    return ds.fp8_linear(input, weight_of(self), self.bias)


def gated_forward(self: Any, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)): x is quantised once, and the SwiGLU is quantised in the launch that computes it."""
    layers = self.gate_proj, self.up_proj, self.down_proj
    simple = not torch.is_grad_enabled() and all(is_linear(layer) and layer.bias is None for layer in layers)
    state: GatedState = getattr(self, STATE)
    w13 = one_below_the_other(layers[0], layers[1], state.w13, fp8=True) if simple else None
    if w13 is None or not isinstance(w13, Fp8Tensor):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
    w2 = weight_of(layers[2])
    if not isinstance(w2, Fp8Tensor):
        w2 = state.w2.of((layers[2].weight,), lambda: ds.quantize(layers[2].weight, BLOCK))
    gate_up = ds.fp8_gemm(ds.quantize(x.reshape(-1, x.shape[-1])), w13, out_dtype=x.dtype)
    out = ds.fp8_gemm(ds.swiglu_quantize(gate_up), w2, out_dtype=x.dtype)
    return out.view(*x.shape[:-1], out.shape[-1])


def norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """RMSNorm in one launch. Unlike the original, it multiplies by the weight before rounding, not after."""
    if self.weight.dtype != hidden_states.dtype:
        return type(self).forward(self, hidden_states)
    return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
