"""Launcher of hopper.cu, the block-scaled e4m3 GEMM for sm_90a, in CUDA C++.

CUDA C++ because Gluon cannot say what decided the speed: a tile of A multicast to a cluster of two, and one lane that
arrives at a barrier. Prototypes at 4096 tokens reached 0.94 to 0.98 of DeepGEMM, against 0.79 to 0.92 in Gluon.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from dskernels.cuda.compiler import kernel, reason_against_cuda
from dskernels.cuda.driver import Launch, tensor_map
from dskernels.gemm.config import HopperConfig, choose_hopper_config

SOURCE = Path(__file__).with_name("hopper.cu")
THREADS = 384
OUT = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
BIAS = {None: 0, torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}

# What a launch needs depends on addresses, sizes and strides alone, and a step meets the same ones again and again.
_launches: dict[tuple, Launch] = {}
_MOST_LAUNCHES = 8192


def fp8_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int,
    bias: Tensor | None,
    out: Tensor,
    accumulate: bool,
) -> None:
    """Fill `out` [M, N], or add to it."""
    key = (
        *(a.data_ptr(), a_scale.data_ptr(), b.data_ptr(), b_scale.data_ptr(), out.data_ptr()),
        *(a.shape, b.shape[0], a.stride(0), a_scale.stride(), b.stride(0), b_scale.stride(), out.stride(0)),
        *(a.device.index, b_rows, out.dtype, accumulate),
        None if bias is None else (bias.data_ptr(), bias.dtype),
    )
    launch = _launches.get(key)
    if launch is None:
        if len(_launches) >= _MOST_LAUNCHES:
            _launches.clear()
        launch = _launches[key] = _prepare(a, a_scale, b, b_scale, b_rows, bias, out, accumulate)
    launch()


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
    if m <= 32:
        return f"up to 32 rows the Triton kernel's narrow tiles are faster; there are {m}"
    if k == 0 or n == 0:
        return "there is nothing to multiply"
    for name, x in (("a", a), ("b", b)):
        if k % 16 or x.stride(0) % 16 or x.data_ptr() % 16:
            return f"the rows of {name} must be aligned to 16 bytes, K = {k} and the row stride is {x.stride(0)}"
    if a_scale.data_ptr() % 16 or (b_rows == 1 and b_scale.data_ptr() % 16):
        return "the scales must be aligned to 16 bytes"
    return reason_against_cuda()


def _prepare(a, a_scale, b, b_scale, b_rows, bias, out, accumulate) -> Launch:
    (m, k), n = a.shape, b.shape[0]
    aligned = out.stride(0) * out.element_size() % 16 == 0 and out.data_ptr() % 16 == 0
    direct = not aligned or (accumulate and out.dtype != torch.float32)
    config = choose_hopper_config(m, n, k, b_rows, multiprocessors(a.device))
    options = options_of(
        config, b_rows, OUT[out.dtype], BIAS[None if bias is None else bias.dtype], int(accumulate), int(direct)
    )
    shared = shared_bytes(config, b_rows, direct)
    clusters = min(config.clusters(m, n), multiprocessors(a.device) // config.cluster)
    scale_map = tensor_map(a_scale.t(), (1, config.block_m), swizzle=False)
    return Launch(
        kernel(SOURCE, "fp8_gemm", options, shared, a.device.index),
        grid=clusters * config.cluster,
        threads=THREADS,
        shared=shared,
        arguments=[
            tensor_map(a, (config.block_m, 128), swizzle=True),
            tensor_map(b, (config.block_n, 128), swizzle=True),
            scale_map,
            tensor_map(b_scale.t(), (1, config.block_n), swizzle=False) if b_rows == 1 else scale_map,
            scale_map if direct else tensor_map(out, (64, 128 // out.element_size()), swizzle=True),
            ctypes.c_void_p(b_scale.data_ptr()),
            ctypes.c_void_p(None if bias is None else bias.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            *map(ctypes.c_int, (m, n, k, b_scale.stride(0), out.stride(0))),
        ],
        device=a.device,
    )


def options_of(config: HopperConfig, b_rows: int, out: int, bias: int, accumulate: int, direct: int) -> dict[str, int]:
    """The -D options that cuda/fp8_gemm.cuh and hopper.cu describe."""
    return {
        "WAVES": config.waves,
        "BLOCK_N": config.block_n,
        "STAGES": config.stages,
        "CLUSTER": config.cluster,
        "SHARED_A": int(config.shared_a),
        "GROUP": config.group,
        "UNROLL": config.unroll,
        "B_ROWS": b_rows,
        "OUT": out,
        "BIAS": bias,
        "ACCUMULATE": accumulate,
        "DIRECT": direct,
    }


def shared_bytes(config: HopperConfig, b_rows: int, direct: bool) -> int:
    """Shared memory of a block, as cuda/fp8_gemm.cuh lays it out."""
    rows, columns = config.block_m, config.block_n
    stage = (rows + columns) * 128 + rows * 4 + (columns * 4 if b_rows == 1 else 16) + 16
    return config.stages * stage + (0 if direct else rows * columns * 2)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
