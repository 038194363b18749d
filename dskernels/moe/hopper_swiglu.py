"""Launcher of hopper_swiglu.cu: the gradient of the SwiGLU, quantised for the products after it, for sm_90a.

If the gradient were written in bf16 and quantised by separate kernels, 27 bytes would move for each element of the
activation; here 9 do. The values that are quantised are the same, as they are rounded to bf16 first here too.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from dskernels.cuda.compiler import kernel
from dskernels.cuda.driver import Plan, Planned, Pointer
from dskernels.device import empty, multiprocessors
from dskernels.fp8.layout import empty_quantized, empty_scale
from dskernels.grouped_gemm.config import padded_width
from dskernels.moe.experts import Batch, Rows
from dskernels.moe.packed import scales_at
from dskernels.moe.triton_swiglu import sum_of_choices
from dskernels.types import Fp8Tensor
from dskernels.validate import ceil_div

SOURCE = Path(__file__).with_name("hopper_swiglu.cu")
THREADS, BLOCKS = 256, 2  # threads of a CTA, and CTAs per multiprocessor
WAITING = 3 * 8 * 16 * THREADS  # bytes of shared memory for dgate, dup and the activation of a tile, in bf16


def swiglu_backward(
    kept: Tensor, dhidden: Tensor, batch: Batch, weights: Tensor | None
) -> tuple[Fp8Tensor, Rows, Rows, Tensor | None]:
    """`Steps.gradient` for `kept` in e4m3 (see `packed`) and `dhidden` in bf16.

    Returns the gradient of gate and up in 1x128 tiles for Dgrad; the same, and the weighted activation, transposed and
    quantised along tokens for Wgrad; and the gradient of the routing weights.
    """
    rows, cols = dhidden.shape
    width = 128 * ceil_div(rows, 128) if batch.offsets is None else padded_width(rows, batch.offsets.shape[0] - 1)
    by_row = Fp8Tensor(*empty_quantized(kept[:, : 2 * cols], (1, 128)))
    along, hidden = (
        Fp8Tensor(empty(kept, (n, width), torch.float8_e4m3fn), empty_scale(kept, (n, width // 128), (1, 128)))
        for n in (2 * cols, cols)
    )
    partial = None if weights is None else empty(kept, (cols // 128, rows), torch.float32)
    operands = kept, dhidden, batch.offsets, batch.source, weights
    _swiglu_backward(*operands, *by_row[:2], *along[:2], *hidden[:2], partial)
    dweights = None
    if partial is not None and weights is not None and batch.source is not None and batch.index is not None:
        dweights = sum_of_choices(partial, batch.source, batch.index, weights)
    return by_row, Rows(along), Rows(hidden), dweights


@Planned
def _swiglu_backward(
    kept: Tensor,
    dhidden: Tensor,
    offsets: Tensor | None,
    source: Tensor | None,
    weights: Tensor | None,
    data: Tensor,
    scale: Tensor,
    along: Tensor,
    along_scale: Tensor,
    hidden: Tensor,
    hidden_scale: Tensor,
    partial: Tensor | None,
) -> Plan:
    rows, cols = dhidden.shape
    groups, tiles = 0 if offsets is None else offsets.shape[0] - 1, along.shape[1] // 128
    shared = WAITING + 8 * (groups + 1)
    chosen = options(weights is not None, offsets is not None)
    return Plan(
        kernel(SOURCE, "swiglu_backward", chosen, shared, dhidden.device.index),
        arguments=(
            *map(Pointer, ("kept", "dhidden", "offsets", "source", "weights")),
            *map(Pointer, ("data", "scale", "along", "along_scale", "hidden", "hidden_scale", "partial")),
            ctypes.c_longlong(kept.stride(0)),
            *map(ctypes.c_int, (scales_at(2 * cols), dhidden.stride(0), rows, cols, groups, tiles)),
            *map(ctypes.c_int, (scale.stride(1), along_scale.stride(1), hidden_scale.stride(1))),
        ),
        grid=min(tiles * (cols // 128), BLOCKS * multiprocessors(dhidden.device)),
        threads=THREADS,
        shared=shared,
        device=dhidden.device,
    )


def options(weighted: bool, grouped: bool) -> dict[str, int]:
    """The -D options of hopper_swiglu.cu."""
    return {"WEIGHTED": int(weighted), "GROUPED": int(grouped), "UE8M0": 0, "BLOCKS": BLOCKS}


def takes(dhidden: Tensor, batch: Batch) -> bool:
    """Whether the kernel takes these rows: bf16, whole tiles of columns and, if there are no groups, of tokens."""
    rows, cols = dhidden.shape
    whole = batch.offsets is not None or rows % 128 == 0
    return dhidden.dtype == torch.bfloat16 and rows > 0 and cols > 0 and cols % 128 == 0 and whole
