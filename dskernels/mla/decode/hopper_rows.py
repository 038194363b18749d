"""Launcher of hopper_rows.cu, decode over an e4m3 latent cache for sm_90a, in CUDA C++.

It is CUDA C++ because fragments are read, converted and transposed byte by byte in registers, between TMA copies and
products that take them from there; Gluon can do neither.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor

from dskernels.cuda.compiler import kernel
from dskernels.cuda.driver import Plan, Pointer
from dskernels.mla.decode.config import THREADS, UNIT, HopperRowsConfig, rows_shared

SOURCE = Path(__file__).with_name("hopper_rows.cu")
LOG2_E = math.log2(math.e)
KINDS = {torch.bfloat16: 0, torch.float16: 1}


def plan(
    config: HopperRowsConfig,
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    q_lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    work: Tensor,
    scale: float,
    row_blocks: int,
    parts: int,
) -> Plan:
    """The launch for a given config; names are those of `decode` in hopper.py, which divides the work."""
    batch, q_tokens, heads, _ = q.shape
    pages, page_size, row_bytes = cache.shape
    # Rows that are copied together, if they are adjacent.
    box = math.gcd(page_size, UNIT) if cache.stride(1) == row_bytes else 1
    shared = rows_shared(config.width, config.units)
    return Plan(
        kernel(SOURCE, "mla_decode", options_of(config, KINDS[q.dtype]), shared, q.device.index),
        arguments=(
            *map(Pointer, ("q", "cache", "block_table", "lengths", "q_lengths", "out", "lse", "work")),
            *map(ctypes.c_longlong, (q.stride(0), q.stride(2), cache.stride(0), cache.stride(1))),
            *map(ctypes.c_int, (block_table.stride(0), pages, page_size, batch, block_table.shape[1] * page_size)),
            *map(ctypes.c_int, (q_tokens, heads, row_blocks, box)),
            ctypes.c_float(scale * LOG2_E),
        ),
        grid=parts * row_blocks,
        threads=THREADS,
        shared=shared,
        device=q.device,
    )


def options_of(config: HopperRowsConfig, out: int) -> dict[str, int]:
    """The -D options that hopper_rows.cu describes."""
    return {
        "OUT": out,
        "WIDTH": config.width,
        "UNITS": config.units,
        "BOUNDARY": config.boundary,
        "WHOLE": config.whole,
        "REGISTERS": config.registers,
    }
