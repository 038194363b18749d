"""The expert block for a few tokens on Hopper, in e4m3 and two launches: for decoding one sequence, or a handful.

hopper_few_up.cu multiplies all tokens by w13 of each expert that any of them chose. The tensor cores take at least 8
tokens anyway, so nothing has to be sorted, appended or copied. hopper_few_down.cu does all the rest: SwiGLU,
quantisation, w2 and the weighted sum. It begins to load its weights before the first kernel has ended (programmatic
dependent launch).
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from dskernels.cuda.compiler import kernel
from dskernels.cuda.driver import Plan, Planned, Pointer
from dskernels.cuda.tensor_map import TensorMap, scale_map
from dskernels.device import empty, multiprocessors
from dskernels.gemm.config import SHARED_LIMIT, SmallConfig
from dskernels.gemm.hopper_small import OUT
from dskernels.moe import config_few as config
from dskernels.moe.experts import Block, Network
from dskernels.types import Fp8Tensor
from dskernels.validate import ceil_div

UP = Path(__file__).with_name("hopper_few_up.cu")
DOWN = Path(__file__).with_name("hopper_few_down.cu")


def fused_experts(block: Block) -> Tensor | None:
    """Output [T, H]; None if these kernels do not take the block.

    They do not take more tokens than `config_few.most_tokens`, a shared network apart from the stack, weights that are
    quantised inside, ids of another dtype than `route` returns, or fp32.
    """
    a, dtype, network, weights, experts, n_shared, shared = block
    w13_scale, w2_scale = network.w13_scale, network.w2_scale
    if shared is not None or not isinstance(a, Fp8Tensor) or w13_scale is None or w2_scale is None:
        return None
    if not _fits(a, dtype, network, experts):
        return None
    tokens, most = a.shape[0], most_of(experts, network.w13, n_shared)
    gate_up = empty(a.data, (most * tokens, network.w13.shape[1]), dtype)
    out = empty(a.data, (tokens, network.w2.shape[1]), dtype)
    weights = weights if weights.stride(1) == 1 else weights.contiguous()
    # Nothing may be launched between the two: the second reads all its inputs but `gate_up` before the first has ended.
    _up(a.data, a.scale, network.w13, w13_scale, experts, gate_up, n_shared)
    _down(gate_up, network.w2, w2_scale, weights, experts, out, n_shared)
    return out


def _fits(a: Fp8Tensor, dtype: torch.dtype, network: Network, experts: Tensor) -> bool:
    few = 0 < a.shape[0] <= config.most_tokens(*network.w2.shape[1:]) and 0 < experts.numel() <= config.MOST_CHOICES
    ids = experts.dtype == torch.int32 and experts.is_contiguous()
    aligned = a.data.data_ptr() % 16 == 0 and a.data.stride(0) % 16 == 0 and a.scale.data_ptr() % 16 == 0
    return few and ids and aligned and a.data.is_cuda and dtype in (torch.bfloat16, torch.float16)


def most_of(experts: Tensor, w13: Tensor, n_shared: int) -> int:
    """The largest number of experts that may run, which is known without reading the ids."""
    return config.most_chosen(experts.numel(), w13.shape[0] - n_shared, n_shared)


@Planned
def _up(
    a: Tensor, a_scale: Tensor, w13: Tensor, w13_scale: Tensor, experts: Tensor, gate_up: Tensor, n_shared: int
) -> Plan:
    """Fill `gate_up`: rows [i * T, i * T + T) are w13 @ x of all T tokens, for the i-th of the experts that run."""
    (tokens, k), (total, n, _), most = a.shape, w13.shape, most_of(experts, w13, n_shared)
    stages = config.up_stages(most)
    return Plan(
        kernel(UP, "few_experts_up", options_of(config.UP, OUT[gate_up.dtype]), SHARED_LIMIT, a.device.index),
        arguments=(
            TensorMap("a", a, (config.UP.tokens, 128), swizzle=True),
            TensorMap("w13", w13.view(-1, k), (config.TILE, 128), swizzle=True),
            scale_map("a_scale", a_scale, config.UP.tokens),
            *map(Pointer, ("w13_scale", "experts", "gate_up")),
            *map(ctypes.c_int, (tokens, experts.numel(), total - n_shared, n_shared, n, k)),
            ctypes.c_longlong(w13_scale.stride(0)),
            *map(ctypes.c_int, (w13_scale.stride(1), stages)),
        ),
        grid=config.up_grid(most, n, multiprocessors(a.device)),
        threads=2 * config.TILE + 32,
        shared=config.up_shared(stages, most),
        device=a.device,
        programmatic=True,
    )


@Planned
def _down(
    gate_up: Tensor, w2: Tensor, w2_scale: Tensor, weights: Tensor, experts: Tensor, out: Tensor, n_shared: int
) -> Plan:
    """Fill `out` [T, H] with the weighted sum of the experts."""
    chosen = config.choose_down(w2.shape[1], multiprocessors(out.device))
    (tokens, top_k), (total, n, k), most = experts.shape, w2.shape, most_of(experts, w2, n_shared)
    stages = config.down_stages(chosen, most, experts.numel())
    return Plan(
        kernel(DOWN, "few_experts_down", options_of(chosen, OUT[out.dtype]), SHARED_LIMIT, out.device.index),
        arguments=(
            TensorMap("w2", w2.view(-1, k), (config.TILE, 128), swizzle=True),
            *map(Pointer, ("w2_scale", "gate_up", "weights", "experts", "out")),
            *map(ctypes.c_int, (tokens, top_k, total - n_shared, n_shared, most, n, k, weights.stride(0))),
            ctypes.c_longlong(w2_scale.stride(0)),
            *map(ctypes.c_int, (w2_scale.stride(1), stages)),
        ),
        grid=ceil_div(n, config.TILE) * chosen.split,
        threads=2 * config.TILE + 32,
        shared=config.down_shared(chosen, stages, most, experts.numel()),
        device=out.device,
        programmatic=True,
    )


def options_of(chosen: SmallConfig, out: int) -> dict[str, int]:
    """The -D options of both kernels, described in cuda/fp8_gemm_small.cuh."""
    return {
        "TILE": chosen.tile,
        "TOKENS": chosen.tokens,
        "SPLIT": chosen.split,
        "OUT": out,
        "BIAS": 0,
        "ACCUMULATE": 0,
        "UE8M0": 0,
    }
