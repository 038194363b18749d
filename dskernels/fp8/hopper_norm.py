"""Launcher of hopper_norm.cu: RMSNorm quantised on sm_90a, in CUDA C++.

It is CUDA C++ because Hopper sums a row's squares in fp64 at little cost, which gives the reference's scales and bytes.
The portable kernel adds pairs of floats, as not every GPU is fast in fp64. On an H200 at 4096 x 7168 that takes 56.2
us, this kernel 37.7, and sums in fp32, whose scales are off by up to 5 ulp, 35.8; with a residual 69.6, 60.2 and 57.7.
Rows that stream through shared memory, loaded ahead by TMA, took 43.6 and 62.4: fewer of them fit on a multiprocessor.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from dskernels.cuda.compiler import kernel, reason_against_cuda
from dskernels.cuda.driver import Plan, Planned, Pointer
from dskernels.device import empty
from dskernels.fp8.config import WIDEST_NORM, HopperNormConfig, choose_hopper_norm
from dskernels.fp8.layout import empty_quantized
from dskernels.recording import Recorded

SOURCE = Path(__file__).with_name("hopper_norm.cu")


@Recorded
def rmsnorm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, ue8m0: bool, with_normed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data and scale of RMSNorm(x [+ residual]), that sum, and the norm; results not asked for have no rows."""
    rows, cols = x.shape
    data, scale = empty_quantized(x, (1, 128))
    total = empty(x, (0 if residual is None else rows, cols), x.dtype)
    normed = empty(x, (rows if with_normed else 0, cols), x.dtype)
    _rmsnorm_quantize(x, weight, eps, residual, ue8m0, with_normed, total, normed, data, scale)
    return data, scale, total, normed


@Planned
def _rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    ue8m0: bool,
    with_normed: bool,
    total: Tensor,
    normed: Tensor,
    data: Tensor,
    scale: Tensor,
) -> Plan:
    rows, cols = x.shape
    config = choose_hopper_norm(cols)
    return Plan(
        kernel(
            SOURCE, "rmsnorm_quantize", options(config, residual is not None, ue8m0, with_normed), 0, x.device.index
        ),
        arguments=(
            *map(Pointer, ("x", "residual", "weight", "total", "normed", "data", "scale")),
            *map(ctypes.c_longlong, (x.stride(0), 0 if residual is None else residual.stride(0))),
            *map(ctypes.c_int, (cols, scale.stride(1))),
            ctypes.c_float(eps),
            ctypes.c_double(1 / cols),
        ),
        grid=rows,
        threads=32 * config.warps,
        shared=0,
        device=x.device,
        programmatic=True,
    )


def options(config: HopperNormConfig, residual: bool, ue8m0: bool, normed: bool = False) -> dict[str, int]:
    """The options that hopper_norm.cu is specialised by."""
    return {
        "RESIDUAL": int(residual),
        "NORMED": int(normed),
        "UE8M0": int(ue8m0),
        "WARPS": config.warps,
        "PER": config.per,
        "BLOCKS": config.blocks,
    }


def rmsnorm_quantize_supports(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, ue8m0: bool, with_normed: bool = False
) -> str | None:
    """Why this kernel does not take these arguments, or None."""
    for name, matrix in (("x", x), ("weight", weight), ("residual", residual)):
        if matrix is None:
            continue
        if matrix.dtype != torch.bfloat16:
            return f"it reads bf16, {name} is {str(matrix.dtype).removeprefix('torch.')}"
        if matrix.stride(-1) != 1 or matrix.data_ptr() % 16 or (matrix.dim() == 2 and matrix.stride(0) % 8):
            return f"rows of {name} must be aligned to 16 bytes, its strides are {list(matrix.stride())}"
    rows, cols = x.shape
    if rows == 0 or cols == 0:
        return "there is nothing to quantise"
    if cols % 8 or cols > WIDEST_NORM:
        return f"it takes multiples of 8 columns up to {WIDEST_NORM}, and there are {cols}"
    return reason_against_cuda()
