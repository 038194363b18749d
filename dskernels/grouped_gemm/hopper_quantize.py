"""Launcher of hopper_quantize.cu: quantising x.T along the tokens of each group, for sm_90a, in CUDA C++.

It is CUDA C++ for the reason that `dskernels.fp8.hopper` gives: Triton transposes a tile of bytes one word per thread
at a time. On an H100, for 8 groups of about 4096 tokens with 7168 channels, Triton takes 1,251 us, this kernel 278, and
a copy of as many bytes 247.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from dskernels.cuda.compiler import kernel, reason_against_cuda
from dskernels.cuda.driver import Plan, Planned, Pointer
from dskernels.device import empty, multiprocessors
from dskernels.fp8.layout import empty_scale
from dskernels.grouped_gemm.config import padded_width
from dskernels.validate import ceil_div

SOURCE = Path(__file__).with_name("hopper_quantize.cu")
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
THREADS = 256
MOST_GROUPS = 2047  # their first rows and first tiles take 16 KiB of a block's shared memory


def quantize_grouped(
    x: Tensor, offsets: Tensor, ue8m0: bool, source: Tensor | None = None, top_k: int = 1, leave: bool = False
) -> tuple[Tensor, Tensor]:
    """Data e4m3 [K, P] and scale [K, P / 128] of x.T; with `source`, token r is row ``source[r] // top_k`` of `x`.

    Tiles that no group fills become zero. With `leave`, they are not written, since `grouped_wgrad` does not read them.
    """
    k, rows = x.shape[1], x.shape[0] if source is None else source.shape[0]
    width = padded_width(rows, offsets.shape[0] - 1)
    data = empty(x, (k, width), torch.float8_e4m3fn)
    scale = empty_scale(x, (k, width // 128), (1, 128))
    if k:
        _quantize_grouped(x, offsets, source, ue8m0, top_k, leave, data, scale)
    return data, scale


@Planned
def _quantize_grouped(
    x: Tensor,
    offsets: Tensor,
    source: Tensor | None,
    ue8m0: bool,
    top_k: int,
    leave: bool,
    data: Tensor,
    scale: Tensor,
) -> Plan:
    (tokens, cols), groups = x.shape, offsets.shape[0] - 1
    tiles, blocks, shared = data.shape[1] // 128, blocks_of(x.dtype), 8 * (groups + 1)
    return Plan(
        kernel(SOURCE, "quantize_grouped", options(x.dtype, source is not None, ue8m0), shared, x.device.index),
        arguments=(
            *map(Pointer, ("x", "offsets", "source", "data", "scale")),
            *map(ctypes.c_int, (x.stride(0), tokens, tokens if source is None else source.shape[0], cols)),
            *map(ctypes.c_int, (groups, tiles, scale.stride(1), top_k, leave)),
        ),
        grid=min(tiles * ceil_div(cols, 128), blocks * multiprocessors(x.device)),
        threads=THREADS,
        shared=shared,
        device=x.device,
    )


def blocks_of(dtype: torch.dtype) -> int:
    """Blocks per SM, as many as registers allow without spilling; a thread holds 64 elements."""
    return 4 if dtype == torch.bfloat16 else 2


def options(dtype: torch.dtype, gather: bool, ue8m0: bool) -> dict[str, int]:
    """The options that hopper_quantize.cu is specialised by."""
    return {"KIND": KINDS[dtype], "GATHER": int(gather), "UE8M0": int(ue8m0), "BLOCKS": blocks_of(dtype)}


def quantize_grouped_supports(
    x: Tensor, offsets: Tensor, ue8m0: bool, source: Tensor | None = None, top_k: int = 1, leave: bool = False
) -> str | None:
    """Why this kernel does not take these arguments, or None."""
    cols, stride, groups = x.shape[1], x.stride(0), offsets.shape[0] - 1
    if cols % 8 or stride * x.element_size() % 16 or x.data_ptr() % 16:
        return f"rows of x must be of whole 16 bytes, there are {cols} columns and a stride of {stride}"
    if groups > MOST_GROUPS:
        return f"it takes {MOST_GROUPS} groups at most, there are {groups}"
    if source is not None and x.shape[0] == 0 and source.shape[0] > 0:
        return f"x has no rows to gather, source has {source.shape[0]}"
    return reason_against_cuda()
