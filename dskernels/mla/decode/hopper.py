"""Launcher of hopper.cu, decode over the latent cache for sm_90a, in CUDA C++; few rows over e4m3 by hopper_rows.py.

It is CUDA C++ because Gluon has neither barriers between two of three warpgroups, nor arrivals of single warps. With
these, the two multiplying warpgroups take turns at the softmax, and release each tile to the loader as soon as they are
done with it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from dskernels.cuda.compiler import kernel, reason_against_cuda
from dskernels.cuda.driver import Plan, Planned, Pointer
from dskernels.cuda.tensor_map import TensorMap
from dskernels.device import multiprocessors
from dskernels.mla.decode import hopper_rows
from dskernels.mla.decode.config import (
    BLOCK,
    MOST_REQUESTS,
    MOST_ROWS,
    ROPE,
    SHARED,
    THREADS,
    TMA,
    VALUE,
    HopperConfig,
    choose_hopper_config,
    choose_rows_config,
    use_rows,
)
from dskernels.mla.decode.hopper_rows import KINDS, LOG2_E
from dskernels.validate import ceil_div

SOURCE = Path(__file__).with_name("hopper.cu")
COMBINE = Path(__file__).with_name("hopper_combine.cu")
COMBINE_WARPS = 8


def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    q_lengths: Tensor | None,
    scale: float,
    value_dim: int,
) -> tuple[Tensor, Tensor]:
    """Attention output [B, Q, H, value_dim] and log-sum-exp [B, H, Q]."""
    batch, q_tokens, heads, _ = q.shape
    out = q.new_empty(batch, q_tokens, heads, value_dim)
    lse = q.new_empty(batch, heads, q_tokens, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if q_tokens > 1 and q.stride(1) != heads * q.stride(2):
        q = q.contiguous()
    work = q.new_empty(work_size(q), dtype=torch.float32)
    decode(q, cache, block_table, lengths, q_lengths, out, lse, work, scale)
    combine(work, out, lse)
    return out, lse


def mla_decode_supports(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    q_lengths: Tensor | None,
    scale: float,
    value_dim: int,
) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    batch, q_tokens, heads, head_dim = q.shape
    if (value_dim, head_dim - value_dim) != (VALUE, ROPE):
        return f"it takes a value dimension of {VALUE} and a rope dimension of {ROPE}"
    if q.dtype not in KINDS:
        return f"it takes bf16 and fp16, q is {q.dtype}"
    if scale <= 0:
        return f"it takes a positive scale, not {scale}"
    if q_tokens * heads > MOST_ROWS or batch > MOST_REQUESTS:
        return f"it takes up to {MOST_ROWS} query rows a request and {MOST_REQUESTS} requests"
    if cache.shape[0] == 0 or block_table.shape[1] == 0:
        return "there is no cache"
    if block_table.shape[1] * cache.shape[1] >= 2**31:
        return "a request's table names 2^31 positions or more"
    for name, x in (("q", q), ("cache", cache)):
        if x.data_ptr() % 16 or any(stride * x.element_size() % 16 for stride in x.stride()[:-1]):
            return f"the rows of {name} must be aligned to 16 bytes, its strides are {x.stride()}"
    return reason_against_cuda()


@Planned
def decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    q_lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    work: Tensor,
    scale: float,
) -> Plan:
    """Fill `out` and `lse` for requests that are in one part; partial results of the others go to `work`."""
    rows, fp8_cache = q.shape[1] * q.shape[2], cache.dtype == torch.uint8
    if fp8_cache and use_rows(rows):
        few = choose_rows_config(rows)
        return hopper_rows.plan(few, q, cache, block_table, lengths, q_lengths, out, lse, work, scale, *_grid(q))
    config = choose_hopper_config(rows, cache.shape[1], fp8_cache)
    return plan(config, q, cache, block_table, lengths, q_lengths, out, lse, work, scale)


def plan(
    config: HopperConfig,
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    q_lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    work: Tensor,
    scale: float,
) -> Plan:
    """The launch of `decode` for a given config."""
    batch, q_tokens, heads, _ = q.shape
    pages, page_size, _ = cache.shape
    row_blocks, parts = _grid(q)
    row = cache.element_size() * cache.stride(1)
    # The heads and new tokens of a request are the rows of one matrix.
    q_map = TensorMap(
        "q",
        q,
        (1, BLOCK, 64),
        swizzle=True,
        sizes=(batch, q_tokens * heads, VALUE + ROPE),
        strides=(_positive(q.stride(0)), _positive(q.stride(2)), 1),
    )
    cache_map = q_map
    if config.loader == TMA:
        strides = (_positive(cache.stride(0)), _positive(cache.stride(1)), 1)
        cache_map = TensorMap("cache", cache, (1, config.box_rows, 64), swizzle=True, strides=strides)
    return Plan(
        kernel(SOURCE, "mla_decode", options_of(config, KINDS[q.dtype]), SHARED, q.device.index),
        arguments=(
            q_map,
            cache_map,
            *map(Pointer, ("cache", "block_table", "lengths", "q_lengths", "out", "lse", "work")),
            *map(ctypes.c_longlong, (cache.stride(0) * cache.element_size(), row)),
            *map(ctypes.c_int, (block_table.stride(0), pages, page_size, batch, block_table.shape[1] * page_size)),
            *map(ctypes.c_int, (q_tokens, heads, row_blocks, config.box_rows)),
            ctypes.c_float(scale * LOG2_E),
        ),
        grid=parts * row_blocks,
        threads=THREADS,
        shared=SHARED,
        device=q.device,
        cluster=config.cluster if config.cluster > 1 else None,
    )


@Planned
def combine(work: Tensor, out: Tensor, lse: Tensor) -> Plan:
    """Fill `out` and `lse` for requests that several parts had."""
    batch, q_tokens, heads, _ = out.shape
    row_blocks, parts = _grid(out)
    # Few rows probably have many parts each, which the warps of a block share.
    wide = COMBINE_WARPS if batch * q_tokens * heads <= 4 * multiprocessors(out.device) else 1
    return Plan(
        kernel(COMBINE, "combine", {"OUT": KINDS[out.dtype], "WIDE": wide}, 0, out.device.index),
        arguments=(
            *map(Pointer, ("work", "out", "lse")),
            *map(ctypes.c_int, (batch, q_tokens, heads, row_blocks, parts)),
        ),
        grid=min(batch, parts) * row_blocks * 4 * (2 * wide),
        threads=COMBINE_WARPS * 32,
        shared=0,
        device=out.device,
        programmatic=True,
        in_graph=False,  # there it begins late: one request of 32,768 takes 40.2 us on an H200, one by one 36.9
    )


def options_of(config: HopperConfig, out: int) -> dict[str, int]:
    """The -D options that hopper.cu describes."""
    return {
        "OUT": out,
        "LOADER": config.loader,
        "WHOLE_BOXES": int(config.box_rows == BLOCK),
        "PREFETCH": config.prefetch,
        "CLUSTER": config.cluster,
        "BOUNDARY": config.boundary,
        "WHOLE": config.whole,
        "REGISTERS": config.registers,
    }


def _grid(x: Tensor) -> tuple[int, int]:
    """Blocks of 64 query rows of a request, and the parts among which the cached positions are divided."""
    row_blocks = ceil_div(x.shape[1] * x.shape[2], BLOCK)
    return row_blocks, multiprocessors(x.device) // row_blocks


def work_size(q: Tensor) -> int:
    """Number of elements of `work`.

    For each part: two partial results of 16 bits per number, their log-sum-exps and four integers; for each CTA a flag.
    """
    row_blocks, parts = _grid(q)
    flags = ceil_div(parts * row_blocks, 4) * 4
    return 2 * parts * row_blocks * BLOCK * (VALUE // 2 + 1) + 4 * min(q.shape[0], parts) + flags


def _positive(stride: int) -> int:
    """The stride of a dimension of size one is never used and may be 0, but a tensor map requires a positive one."""
    return stride or 16
