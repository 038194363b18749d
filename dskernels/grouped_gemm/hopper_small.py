"""Launchers of hopper_small.cu, the grouped e4m3 products for groups of few rows on sm_90a.

The time is that of reading the matrices of those groups that have rows. On an H100 whose copies reach 3,002 GB/s, 1,024
rows in 256 groups, 4096x7168, took 2,388 us, which is 3,068 GB/s for the bytes that are touched; 8 rows, one per group,
took 93 us. Buffers with 16 rows for each of 32 groups reached 2,792 GB/s, and for 7168x2048 2,677.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from torch import Tensor

from dskernels.cuda.compiler import kernel
from dskernels.cuda.driver import Plan, Planned, Pointer
from dskernels.cuda.tensor_map import TensorMap, scale_map
from dskernels.device import multiprocessors
from dskernels.gemm.config import SHARED_LIMIT, SmallConfig
from dskernels.gemm.hopper_small import OUT
from dskernels.grouped_gemm import config_small

SOURCE = Path(__file__).with_name("hopper_small.cu")


@Planned
def grouped_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor) -> Plan:
    """Fill `out` [T, N]; rows that belong to no group become zero."""
    config = config_small.choose_contiguous_config(a.shape[0], b.shape[0])
    return plan(config, a, a_scale, b, b_scale, offsets, out)


@Planned
def grouped_gemm_masked(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out: Tensor) -> Plan:
    """Fill the first `counts` rows of each group in `out` [E, M, N]."""
    config = config_small.choose_masked_config(a.shape[1])
    return plan_masked(config, a, a_scale, b, b_scale, counts, out)


def plan(
    config: SmallConfig, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor
) -> Plan:
    """The launch for a given config, for groups that follow each other in one matrix of rows."""
    return _plan(config, a, a_scale, b, b_scale, a.shape[0], Pointer("offsets"), out)


def plan_masked(
    config: SmallConfig, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out: Tensor
) -> Plan:
    """The launch for a given config, for groups that have a buffer of rows each."""
    rows = a.shape[1]
    a, a_scale, out = (x.view(-1, x.shape[-1]) for x in (a, a_scale, out))
    return _plan(config, a, a_scale, b, b_scale, rows, Pointer("counts"), out)


def _plan(
    config: SmallConfig, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, rows: int, sizes: Pointer, out: Tensor
) -> Plan:
    """The launch for two-dimensional `a` and `out`. `rows` is the number of rows of `a`, or of each group's buffer."""
    groups, n, k = b.shape
    processors = multiprocessors(a.device)
    stages = config_small.stages(config, groups)
    options = options_of(config, OUT[out.dtype], masked=sizes.name == "counts")
    return Plan(
        kernel(SOURCE, "grouped_gemm_small", options, SHARED_LIMIT, a.device.index),
        arguments=(
            TensorMap("a", a, (config.tokens, 128), swizzle=True),
            TensorMap("b", b.view(-1, k), (config.tile, 128), swizzle=True),
            scale_map("a_scale", a_scale, config.tokens + 4),
            Pointer("b_scale"),
            sizes,
            Pointer("out"),
            *map(ctypes.c_int, (groups, rows, n, k)),
            ctypes.c_longlong(b_scale.stride(0)),
            *map(ctypes.c_int, (b_scale.stride(1), out.stride(0), stages)),
        ),
        grid=config_small.grid(config, a.shape[0], groups, n, processors),
        threads=2 * config.tile + 32,
        shared=config_small.shared_bytes(config, stages, groups),
        device=a.device,
    )


def options_of(config: SmallConfig, out: int, *, masked: bool) -> dict[str, int]:
    """The -D options, which hopper_small.cu and cuda/fp8_gemm_small.cuh describe."""
    return {
        "TILE": config.tile,
        "TOKENS": config.tokens,
        "SPLIT": config.split,
        "OUT": out,
        "BIAS": 0,
        "ACCUMULATE": 0,
        "MASKED": int(masked),
    }
