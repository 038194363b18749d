"""Launchers of hopper_small.cu, the products for few rows on sm_90a: of block-scaled e4m3, of bf16 and of fp16.

The time is that of reading the weights: with one row, the kernel takes 0.74 to 0.86 of cuBLASLt's time. It is CUDA C++
because Gluon in Triton 3.6 has neither clusters nor L2 policies. Unless the loads of B are marked evict-first, they
force what others left in the L2 to be written back, and 4096x7168 takes 21.0 us with 64 rows instead of 18.6.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from dskernels.cuda.compiler import kernel
from dskernels.cuda.driver import Plan, Planned, Pointer
from dskernels.cuda.tensor_map import TensorMap, scale_map
from dskernels.device import multiprocessors
from dskernels.gemm.config import SHARED_LIMIT, SmallConfig, choose_small_config

SOURCE = Path(__file__).with_name("hopper_small.cu")
OUT = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
HALF = {torch.bfloat16: 1, torch.float16: 2}
BIAS = {None: 0, torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
# Up to this K, a CTA requests whole rows of B at once, and the L2 fetch granularity of B's tensor map is set to the 128
# bytes that a copy takes of a row: 32768x512 took 12.7 us with one row and 13.5 with 64; with a granularity of 256
# bytes 13.7 and 14.7. From K = 1536 on it makes no difference.
SHORT_K = 512


def plan(
    config: SmallConfig,
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    accumulate: bool,
) -> Plan:
    """The launch of the e4m3 product for a given config, with B in blocks of 128x128; the names are those of `fp8_gemm`
    in hopper.py."""
    (m, k), n = a.shape, b.shape[0]
    processors = multiprocessors(a.device)
    stages = config.stages(m, n, k, processors)
    options = options_of(config, OUT[out.dtype], BIAS[None if bias is None else bias.dtype], int(accumulate))
    whole, last = TensorMap("a", a, (min(config.tokens, m), 128), swizzle=True), m % config.tokens
    return Plan(
        kernel(SOURCE, "fp8_gemm_small", options, SHARED_LIMIT, a.device.index),
        arguments=(
            whole,
            TensorMap("a", a, (last, 128), swizzle=True) if last else whole,
            TensorMap("b", b, (config.tile, 128), swizzle=True, fetch=128 if k <= SHORT_K else 256),
            scale_map("a_scale", a_scale, config.tokens),
            Pointer("b_scale"),
            Pointer("bias"),
            Pointer("out"),
            *map(ctypes.c_int, (m, n, k, b_scale.stride(0), out.stride(0), stages)),
        ),
        grid=config.grid(m, n, processors),
        threads=2 * config.tile + 32,
        shared=config.shared_bytes(stages, config.tiles(m, n, processors)),
        device=a.device,
        programmatic=True,
    )


@Planned
def half_gemm(a: Tensor, b: Tensor, out: Tensor) -> Plan:
    """Fill `out` [M, N] with ``a @ b.T`` for `a` [M, K] and `b` [N, K] in bf16 or fp16.

    Tiles are chosen as for e4m3 with twice the K, which has as many bytes.
    """
    (m, k), n = a.shape, b.shape[0]
    return plan_half(choose_small_config(m, n, 2 * k, multiprocessors(a.device)), a, b, out)


def takes_half(a: Tensor, b: Tensor) -> bool:
    """Whether `half_gemm` supports these: bf16 or fp16, not empty, rows contiguous and aligned to 16 bytes."""
    if a.dtype not in HALF or b.dtype != a.dtype or a.numel() == 0 or b.numel() == 0:
        return False
    return all(x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 for x in (a, b))


def plan_half(config: SmallConfig, a: Tensor, b: Tensor, out: Tensor) -> Plan:
    """The launch of `half_gemm` for a given config."""
    (m, k), n = a.shape, b.shape[0]
    processors = multiprocessors(a.device)
    stages = config.stages(m, n, 2 * k, processors)
    options = options_of(config, OUT[out.dtype], 0, 0, HALF[a.dtype])
    whole, last = TensorMap("a", a, (min(config.tokens, m), 64), swizzle=True), m % config.tokens
    return Plan(
        kernel(SOURCE, "fp8_gemm_small", options, SHARED_LIMIT, a.device.index),
        arguments=(
            whole,
            TensorMap("a", a, (last, 64), swizzle=True) if last else whole,
            TensorMap("b", b, (config.tile, 64), swizzle=True),
            whole,
            *[ctypes.c_void_p(None)] * 2,
            Pointer("out"),
            *map(ctypes.c_int, (m, n, k, 0, out.stride(0), stages)),
        ),
        grid=config.grid(m, n, processors),
        threads=2 * config.tile + 32,
        shared=config.shared_bytes(stages, config.tiles(m, n, processors)),
        device=a.device,
        programmatic=True,
    )


def options_of(config: SmallConfig, out: int, bias: int, accumulate: int, half: int = 0) -> dict[str, int]:
    """The -D options, which cuda/fp8_gemm_small.cuh describes."""
    return {
        "TILE": config.tile,
        "TOKENS": config.tokens,
        "SPLIT": config.split,
        "OUT": out,
        "BIAS": bias,
        "ACCUMULATE": accumulate,
        "HALF": half,
        "PAIRS": int(half == 0 and config.tokens <= 32),
    }
