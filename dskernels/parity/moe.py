"""Parity cases of the expert block: permuting must be equal to the bit; some choices are dropped, some experts idle."""

from __future__ import annotations

import torch
from torch import Tensor

from dskernels.parity import Case
from dskernels.parity.inputs import normal
from dskernels.reference.fp8 import quantize
from dskernels.reference.moe import permute
from dskernels.types import Fp8Tensor, Permuted, Routing

EXACT = 0.0
FP32 = 1e-10
# Tensor cores are off by 2^-13, which rounds a sum to another e4m3 value once in 2^9 times, a step of 2^-3.5: half of
# 2^-9 * 2^-7.
REQUANTIZED = 1e-5
# bf16 between the products: four roundings of 2^-9, half of whose squares is 8e-6.
BF16 = 3e-5
# The reference quantises gradients after they are weighted, the kernels before: both have the error of e4m3.
E4M3 = 2e-3


def _experts(tokens: int, top_k: int, n_experts: int) -> Tensor:
    """Different experts for each token, the last one idle; one choice is dropped, and all of token 1."""
    generator = torch.Generator().manual_seed(7)
    experts = torch.rand(tokens, n_experts - 1, generator=generator).topk(top_k).indices.int()
    experts[0, -1] = -1
    experts[1] = n_experts
    return experts


def _permute(tokens: int, width: int, top_k: int, n_experts: int, dtype: torch.dtype):
    def inputs(device: torch.device) -> tuple[tuple, dict]:
        x = normal(0, tokens, width, dtype=dtype)
        return (x.to(device), _experts(tokens, top_k, n_experts).to(device), n_experts), {}

    return inputs


def _combine(tokens: int, width: int, top_k: int, n_experts: int, dtype: torch.dtype):
    def inputs(device: torch.device) -> tuple[tuple, dict]:
        permuted = permute(normal(0, tokens, width), _experts(tokens, top_k, n_experts), n_experts)
        y = normal(1, tokens * top_k, width, dtype=dtype).to(device)
        return (y, Permuted(*(t.to(device) for t in permuted)), normal(2, tokens, top_k).to(device)), {}

    return inputs


def _block(tokens: int, width: int, hidden: int, dtype: torch.dtype, *, quantized: bool = False, fp8: bool = False):
    def inputs(device: torch.device) -> tuple[tuple, dict]:
        n_experts, top_k = 5, 2
        experts = _experts(tokens, top_k, n_experts)
        weights = normal(1, tokens, top_k).sigmoid()
        load = torch.bincount(experts.flatten().clamp(0, n_experts), minlength=n_experts)[:n_experts].int()
        routing = Routing(weights, experts, load, torch.tensor(0, dtype=torch.int32))
        shapes = ((n_experts, 2 * hidden, width), (n_experts, width, hidden), (2 * hidden, width), (width, hidden))
        plain = [normal(2 + i, *shape, dtype=dtype, scale=shape[-1] ** -0.5) for i, shape in enumerate(shapes)]
        w13, w2, *shared = (_quantized(w, device) if quantized else w.to(device) for w in plain)
        x = normal(0, tokens, width, dtype=dtype).to(device)
        options = {"shared": tuple(shared), "fp8": fp8, "recompute": False}
        return (x, w13, w2, Routing(*(t.to(device) for t in routing))), options

    return inputs


def _quantized(weight: Tensor, device: torch.device) -> Fp8Tensor:
    quantized = quantize(weight, (128, 128))
    return quantized.to(device)


CASES = [
    Case("permute", "70x136, top 3 of 6, bf16", _permute(70, 136, 3, 6, torch.bfloat16), EXACT),
    Case("permute", "33x40, top 2 of 256, gradient", _permute(33, 40, 2, 256, torch.float32), FP32, gradient=True),
    Case("combine", "70x136, top 3 of 6, bf16", _combine(70, 136, 3, 6, torch.bfloat16), BF16),
    Case("combine", "33x40, top 2 of 8, gradients", _combine(33, 40, 2, 8, torch.float32), FP32, gradient=True),
    Case("fused_experts", "20x136, 5x40 + shared, bf16", _block(20, 136, 40, torch.bfloat16), BF16),
    Case("fused_experts", "20x136, 5x40 + shared, gradients", _block(20, 136, 40, torch.float32), FP32, gradient=True),
    Case(
        "fused_experts", "20x200, 5x72 + shared, e4m3", _block(20, 200, 72, torch.float32, quantized=True), REQUANTIZED
    ),
    Case(
        "fused_experts",
        "20x136, 5x40 + shared, e4m3 inside, gradients",
        _block(20, 136, 40, torch.float32, fp8=True),
        E4M3,
        gradient=True,
    ),
]
