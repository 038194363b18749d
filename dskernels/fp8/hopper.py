"""Launcher of hopper.cu: quantising for sm_90a, in CUDA C++.

It is CUDA C++ because Triton transposes a tile of bytes through shared memory one word per thread. On an H100 at
4096 x 7168, with Triton's time first: both results 72 us and 48, transposed 41 and 37, columns 55 and 37, tiles 39 and
36, rows 37 and 36; the transposed SwiGLU 77 and 60. A copy of the bytes that `quantize` moves takes 34.4. The gradient
of RMSNorm is left to Triton (73.6 against 71.0); RMSNorm itself is in hopper_norm.cu.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from dskernels.cuda.compiler import kernel, reason_against_cuda
from dskernels.cuda.driver import Plan, Planned, Pointer
from dskernels.fp8.config import (
    BY_TILE,
    MATRIX,
    QUANTIZE_BOTH,
    QUANTIZE_WEIGHT,
    SWIGLU,
    SWIGLU_BACKWARD,
    SWIGLU_KEPT,
    SWIGLU_TRANSPOSED,
    HopperConfig,
    choose_hopper,
)
from dskernels.fp8.layout import empty_quantized
from dskernels.recording import Recorded
from dskernels.validate import ceil_div

SOURCE = Path(__file__).with_name("hopper.cu")
# With few rows, Triton computes the untransposed gated product: on an H200, 128 rows take 6.9 us (here 7.5), 4096 rows
# 19.5 (here 17.3).
FEWEST_GATED = 1024
MOST_STRIDE = 1 << 27  # seven rows of it, counted in 32 bits


@Recorded
def quantize(x: Tensor, block_rows: int, block_cols: int, ue8m0: bool, transpose: bool) -> tuple[Tensor, Tensor]:
    """Data and scale of `x` [E?, rows, cols]."""
    block = (block_rows, block_cols)
    data, scale = empty_quantized(x, block, transpose)
    results = (None, None, data, scale) if transpose else (data, scale, None, None)
    _quantize(choose_hopper(block, transpose), x, None, ue8m0, *results, None, None)
    return data, scale


@Recorded
def quantize_both(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data and scale of `x` [rows, cols] in 1x128 tiles, then of x.T."""
    results = (*empty_quantized(x, (1, 128)), *empty_quantized(x, (128, 1), transpose=True))
    _quantize(QUANTIZE_BOTH, x, None, ue8m0, *results, None, None)
    return results


@Recorded
def quantize_weight(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data and scale of `x` [E?, rows, cols] in 128x128 blocks, then of x.T."""
    results = (*empty_quantized(x, (128, 128)), *empty_quantized(x, (128, 128), transpose=True))
    _quantize(QUANTIZE_WEIGHT, x, None, ue8m0, *results, None, None)
    return results


@Recorded
def swiglu_quantize(gate_up: Tensor, ue8m0: bool, transpose: bool) -> tuple[Tensor, Tensor]:
    """Data and scale of silu(gate) * up, or of its transpose, `gate_up` being [T, 2I]."""
    data, scale = empty_quantized(gate_up[:, : gate_up.shape[1] // 2], (128, 1) if transpose else (1, 128), transpose)
    results = (None, None, data, scale) if transpose else (data, scale, None, None)
    _quantize(SWIGLU_TRANSPOSED if transpose else SWIGLU, gate_up, None, ue8m0, *results, None, None)
    return data, scale


def swiglu_quantize_rows(
    gate_up: Tensor, offsets: Tensor | None = None, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The results of `swiglu_quantize` for rows in groups: rows from ``offsets[-1]`` on are not written.

    `gate_up` itself, in 1x128 tiles, is written to `kept` if that is given (see dskernels.moe.packed).
    """
    data, scale = empty_quantized(gate_up[:, : gate_up.shape[1] // 2], (1, 128))
    config = SWIGLU if kept is None else SWIGLU_KEPT
    _quantize(config, gate_up, None, False, data, scale, None, None, kept, offsets)
    return data, scale


@Recorded
def swiglu_quantize_backward(dy: Tensor, gate_up: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data and scale of the gradient [T, 2I] of silu(gate) * up in 1x128 tiles, then of its transpose."""
    results = (*empty_quantized(gate_up, (1, 128)), *empty_quantized(gate_up, (128, 1), transpose=True))
    _quantize(SWIGLU_BACKWARD, gate_up, dy, ue8m0, *results, None, None)
    return results


@Planned
def _quantize(
    config: HopperConfig,
    x: Tensor,
    dy: Tensor | None,
    ue8m0: bool,
    data: Tensor | None,
    scale: Tensor | None,
    data_t: Tensor | None,
    scale_t: Tensor | None,
    kept: Tensor | None,
    offsets: Tensor | None,
) -> Plan:
    """Fill the results that exist: of x, and of its transpose."""
    rows, cols = x.shape[-2:]
    if config.source != MATRIX:
        cols //= 2
    tiles_r, tiles_c = ceil_div(rows, config.rows), ceil_div(cols, 128)
    return Plan(
        kernel(SOURCE, "quantize", options(config, ue8m0), config.shared, x.device.index),
        arguments=(
            *map(Pointer, ("x", "dy", "data", "scale", "data_t", "scale_t", "kept")),
            ctypes.c_longlong(x.stride(0) if x.dim() == 3 else 0),
            *map(ctypes.c_int, (x.stride(-2), 0 if dy is None else dy.stride(0))),
            *map(ctypes.c_int, (rows, cols, tiles_r, tiles_c)),
            *map(ctypes.c_int, (_tile_stride(config.plain, scale), _tile_stride(config.transposed, scale_t))),
            ctypes.c_int(0 if kept is None else kept.stride(0)),
            Pointer("offsets"),
            ctypes.c_int(0 if offsets is None else offsets.shape[0] - 1),
        ),
        grid=tiles_r * tiles_c * (x.shape[0] if x.dim() == 3 else 1),
        threads=32 * config.warps,
        shared=config.shared,
        device=x.device,
    )


def options(config: HopperConfig, ue8m0: bool) -> dict[str, int]:
    """The options that hopper.cu is specialised by."""
    return {
        "SOURCE": config.source,
        "PLAIN": config.plain,
        "TRANSPOSED": config.transposed,
        "UE8M0": int(ue8m0),
        "WARPS": config.warps,
        "BLOCKS": config.blocks,
        "DOWN": int(config.down),
        "KEPT": int(config.kept),
    }


def _tile_stride(kind: int, scale: Tensor | None) -> int:
    """The stride of `scale` from one tile to the next, across the direction of a tile's elements."""
    if scale is None:
        return 0
    return scale.stride(-2) if kind == BY_TILE else max(scale.stride())


def quantize_supports(x: Tensor, block_rows: int, block_cols: int, ue8m0: bool, transpose: bool) -> str | None:
    """Why this kernel does not take these arguments, or None."""
    return _reason_against(x, transpose) or reason_against_cuda()


def quantize_both_supports(x: Tensor, ue8m0: bool) -> str | None:
    """Why this kernel does not take these arguments, or None."""
    return _reason_against(x, True) or reason_against_cuda()


def quantize_weight_supports(x: Tensor, ue8m0: bool) -> str | None:
    """Why this kernel does not take these arguments, or None."""
    return _reason_against(x, True) or reason_against_cuda()


def swiglu_quantize_supports(gate_up: Tensor, ue8m0: bool, transpose: bool) -> str | None:
    """Why this kernel does not take these arguments, or None."""
    if not transpose and 0 < gate_up.shape[0] < FEWEST_GATED:
        return f"the Triton kernel is faster for fewer than {FEWEST_GATED} rows"
    return _reason_against(gate_up, transpose, halves=True, name="gate_up") or reason_against_cuda()


def swiglu_quantize_kept_supports(gate_up: Tensor) -> str | None:
    """Why this kernel does not take these arguments, or None."""
    if gate_up.shape[1] % 256:
        return f"the gate's columns must fill tiles of 128, there are {gate_up.shape[1] // 2}"
    return _reason_against(gate_up, False, halves=True, name="gate_up")


def swiglu_quantize_backward_supports(dy: Tensor, gate_up: Tensor, ue8m0: bool) -> str | None:
    """Why this kernel does not take these arguments, or None."""
    if dy.shape[1] % 128:
        return f"the gate's columns must fill tiles of 128, there are {dy.shape[1]}"
    return (
        _reason_against(gate_up, True, halves=True, name="gate_up")
        or _reason_against(dy, True, name="dy")
        or reason_against_cuda()
    )


def _reason_against(x: Tensor, transpose: bool, *, halves: bool = False, name: str = "x") -> str | None:
    if x.dtype != torch.bfloat16:
        return f"it reads bf16, {name} is {str(x.dtype).removeprefix('torch.')}"
    if x.numel() == 0:
        return "there is nothing to quantise"
    rows, cols = x.shape[-2], x.shape[-1] // 2 if halves else x.shape[-1]
    strides = (x.stride(-2), x.stride(0) if x.dim() == 3 else 0)
    if cols % 8 or strides[0] % 8 or strides[1] % 8 or x.data_ptr() % 16 or strides[0] > MOST_STRIDE:
        return f"rows of {name} must be aligned to 16 bytes, there are {cols} columns and strides {strides}"
    if transpose and rows % 16:
        return f"rows of the transposed result must be aligned to 16 bytes, {name} has {rows} rows"
    return None
