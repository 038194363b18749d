"""Launcher of hopper.cu, the block-scaled e4m3 GEMM for sm_90a, in CUDA C++.

It is CUDA C++ because Gluon cannot express what decided the speed: multicasting a tile of A to a cluster of two CTAs,
and a single thread that waits, issues copies and arrives for its warp. At 4,096 tokens, prototypes in Gluon reached
0.79 to 0.92 of the speed of DeepGEMM, which reached 1.10 to 1.21 of cuBLASLt's; this kernel reaches 1.09 to 1.30.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from dskernels.cuda.compiler import kernel, reason_against_cuda
from dskernels.cuda.driver import Plan, Planned, Pointer
from dskernels.cuda.tensor_map import TensorMap, scale_map
from dskernels.device import multiprocessors
from dskernels.gemm import hopper_small
from dskernels.gemm.config import HopperConfig, choose_hopper_config, choose_small_config, use_small
from dskernels.gemm.hopper_small import BIAS, OUT

SOURCE = Path(__file__).with_name("hopper.cu")
THREADS = 384


@Planned
def fp8_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int,
    bias: Tensor | None,
    out: Tensor,
    accumulate: bool,
) -> Plan:
    """Fill `out` [M, N], or add to it. Few rows are left to the kernel of hopper_small.py."""
    (m, k), n = a.shape, b.shape[0]
    if b_rows == 128 and use_small(m, n, k, multiprocessors(a.device)):
        small = choose_small_config(m, n, k, multiprocessors(a.device))
        return hopper_small.plan(small, a, a_scale, b, b_scale, bias, out, accumulate)
    config = choose_hopper_config(m, n, k, b_rows, multiprocessors(a.device))
    return plan(config, a, a_scale, b, b_scale, b_rows, bias, out, accumulate)


def fp8_gemm_supports(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int,
    bias: Tensor | None,
    out: Tensor,
    accumulate: bool,
) -> str | None:
    """Why this kernel does not take these arguments, or None."""
    (m, k), n = a.shape, b.shape[0]
    if m <= 32 and b_rows == 1:
        return f"the kernel for few rows takes B in 128x128 blocks only, and there are {m} rows"
    if m == 0 or k == 0 or n == 0:
        return "there is nothing to multiply"
    for name, x in (("a", a), ("b", b)):
        if k % 16 or x.stride(0) % 16 or x.data_ptr() % 16:
            return f"the rows of {name} must be aligned to 16 bytes, K = {k} and the row stride is {x.stride(0)}"
    if a_scale.data_ptr() % 16 or (b_rows == 1 and b_scale.data_ptr() % 16):
        return "the scales must be aligned to 16 bytes"
    return reason_against_cuda()


def plan(
    config: HopperConfig,
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int,
    bias: Tensor | None,
    out: Tensor,
    accumulate: bool,
) -> Plan:
    """The launch for a given config; the names are those of `fp8_gemm`."""
    (m, k), n = a.shape, b.shape[0]
    aligned = out.stride(0) * out.element_size() % 16 == 0 and out.data_ptr() % 16 == 0
    direct = not aligned or (accumulate and out.dtype != torch.float32)
    options = options_of(
        config,
        b_rows,
        OUT[out.dtype],
        BIAS[None if bias is None else bias.dtype],
        int(accumulate),
        int(direct),
    )
    shared = shared_bytes(config, b_rows, direct)
    clusters = min(config.clusters(m, n), multiprocessors(a.device) // config.cluster)
    a_scale_map = scale_map("a_scale", a_scale, config.block_m)
    a_map, rest = TensorMap("a", a, (config.block_m, 128), swizzle=True), 0 if b_rows == 1 else m % config.block_m
    return Plan(
        kernel(SOURCE, "fp8_gemm", options, shared, a.device.index),
        arguments=(
            a_map,
            TensorMap("a", a, (rest, 128), swizzle=True) if rest else a_map,
            TensorMap("b", b, (config.block_n, 128), swizzle=True),
            a_scale_map,
            scale_map("b_scale", b_scale, config.block_n) if b_rows == 1 else a_scale_map,
            a_scale_map if direct else TensorMap("out", out, (64, 128 // out.element_size()), swizzle=True),
            Pointer("b_scale"),
            Pointer("bias"),
            Pointer("out"),
            *map(ctypes.c_int, (m, n, k, b_scale.stride(0), out.stride(0))),
        ),
        grid=clusters * config.cluster,
        threads=THREADS,
        shared=shared,
        device=a.device,
    )


def options_of(config: HopperConfig, b_rows: int, out: int, bias: int, accumulate: int, direct: int) -> dict[str, int]:
    """The -D options, which cuda/fp8_gemm.cuh describes."""
    return {
        "WAVES": config.waves,
        "BLOCK_N": config.block_n,
        "STAGES": config.stages,
        "CLUSTER": config.cluster,
        "SHARED_A": int(config.shared_a),
        "GROUP": config.group,
        "UNROLL": config.unroll,
        "REGISTERS": config.registers,
        "AHEAD": config.ahead,
        "ONE_READER": int(config.one_reader),
        "B_ROWS": b_rows,
        "OUT": out,
        "BIAS": bias,
        "ACCUMULATE": accumulate,
        "DIRECT": direct,
    }


def shared_bytes(config: HopperConfig, b_rows: int, direct: bool) -> int:
    """Bytes of shared memory of a CTA, as laid out in cuda/fp8_gemm.cuh."""
    rows, columns = config.block_m, config.block_n
    stage = (rows + columns) * 128 + rows * 4 + (columns * 4 if b_rows == 1 else 16) + 16
    return config.stages * stage + (0 if direct else rows * columns * 2)
