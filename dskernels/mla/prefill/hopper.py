"""Launchers of hopper.cu, prefill for sm_90a, in CUDA C++.

It is CUDA C++ because Gluon has no named barriers, with which two warpgroups take turns at the tensor cores: there,
waiting stops a whole partition. Keys are 192 wide and values 128, as in DeepSeek-V3; other head dimensions run the
portable kernel.

A call is two launches: one CTA that finds and orders the tiles of queries (cu_seqlens is on the device), and the kernel
that computes them, which begins while the first runs and waits for it (programmatic dependent launch).

On an H200, causal, relative to cuDNN in the same run: 1 x 128 heads x 4,096 1.19 (658 TFLOP/s), 1 x 128 x 8,192 1.20
(645), 4 x 16 x 4,096 1.13 (637); sequences of mixed lengths at 99% of the rate of equal ones. See docs/mla_prefill.md.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor

from dskernels.cuda.compiler import kernel, reason_against_cuda
from dskernels.cuda.driver import Plan, Planned, Pointer
from dskernels.cuda.tensor_map import RAGGED_ROWS, TensorMap
from dskernels.device import empty, multiprocessors
from dskernels.validate import ceil_div

SOURCE = Path(__file__).with_name("hopper.cu")
KINDS = {torch.bfloat16: 0, torch.float16: 1}
OUT = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
KEY_DIM, ROPE_DIM, VALUE_DIM = 192, 64, 128
BLOCK_M, BLOCK_N, BOX = 128, 128, 64
THREADS, PLAN_THREADS = 384, 1024
SHARED = 2 * BLOCK_M * KEY_DIM + 2 * 2 * BLOCK_N * (KEY_DIM + VALUE_DIM) + 2 * 32 + 8 * 16
CHUNKS = 32  # of keys, by which tiles are sorted
ENTRY = 8  # integers per tile in the list, and in the header before it
# Keys and values that are read at one time: those of as many heads as fit, or of a part of the sequences. Of the 50 MB
# of L2 of an H100 and an H200, the rest is for queries and results.
TOGETHER_BYTES = 32 * 2**20
LOG2_E = math.log2(math.e)


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("tokens_q", "tokens_k", "sequences", "causal", "chunk")]


class _Heads(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("count", "group", "together", "of_row")]


# ---- launchers ------------------------------------------------------------------------------------------------------


def mla_prefill(
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Attention output [T, H, V] and log-sum-exp [H, T]."""
    tokens, heads, _ = q.shape
    out = empty(q, (tokens, heads, VALUE_DIM), out_dtype)
    lse = empty(q, (heads, tokens), torch.float32)
    if tokens and heads:
        if k.shape[0] == 0:
            return out.zero_(), lse.fill_(-math.inf)
        _launch(q, k, k_rope, v, cu_q, cu_k, scale, causal, False, out, lse)
    return out, lse


def mla_prefill_some(
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Causal attention of some heads: their part of `out` [T, H, V], whose rows contain all heads, and of `lse` [H,
    T]."""
    if out.numel() and k.shape[0]:
        _launch(q, k, k_rope, v, cu_q, cu_k, scale, True, False, out, lse)
    else:
        out.zero_()
        lse.fill_(-math.inf)


def mla_prefill_onto(
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Merge attention to these keys, not causal, into `out` [T, H, V] and `lse` [H, T], which are fp32."""
    if out.numel() and k.shape[0]:
        _launch(q, k, k_rope, v, cu_q, cu_k, scale, False, True, out, lse)


def _launch(
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool,
    merge: bool,
    out: Tensor,
    lse: Tensor,
) -> None:
    work = empty(q, (ENTRY * (_most_tiles(q, cu_q) + 1),), torch.int32)
    _plan_tiles(q, k, cu_q, cu_k, work, causal, merge, out)
    _attend(q, k, k_rope, v, cu_q, work, scale, causal, merge, out, lse)


@Planned
def _plan_tiles(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, work: Tensor, causal: bool, merge: bool, out: Tensor
) -> Plan:
    """Fill `work` with a counter, the number of tiles, and the tiles."""
    tokens_q, tokens_k = q.shape[0], k.shape[0]
    chunk = max(TOGETHER_BYTES // _key_bytes(1), ceil_div(tokens_k + 1, CHUNKS))
    return Plan(
        kernel(SOURCE, "plan", options_of(q.dtype, out.dtype, merge), 0, q.device.index),
        arguments=(
            Pointer("cu_q"),
            Pointer("cu_k"),
            Pointer("work"),
            _Sizes(tokens_q, tokens_k, cu_q.shape[0] - 1, causal, chunk),
        ),
        grid=1,
        threads=PLAN_THREADS,
        shared=0,
        device=q.device,
    )


@Planned
def _attend(
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    work: Tensor,
    scale: float,
    causal: bool,
    merge: bool,
    out: Tensor,
    lse: Tensor,
) -> Plan:
    """Fill `out` [T, H, V] and `lse` [H, T], tile by tile of `work`."""
    (tokens, heads, _), (tokens_k, heads_k, _) = q.shape, k.shape
    group = heads // heads_k
    rounds = ceil_div(heads, max(TOGETHER_BYTES // _key_bytes(tokens_k), 1) * group)
    k_map = TensorMap("k", k, (BLOCK_N, 1, BOX), swizzle=True)
    return Plan(
        kernel(SOURCE, "attend", options_of(q.dtype, out.dtype, merge), SHARED, q.device.index),
        arguments=(
            TensorMap("q", q, (64, 1, BOX), swizzle=True),
            k_map,
            k_map if k_rope is None else TensorMap("k_rope", k_rope, (BLOCK_N, BOX), swizzle=True),
            _values_map(v),
            Pointer("work"),
            Pointer("out"),
            Pointer("lse"),
            ctypes.c_int(tokens),
            _Heads(heads, group, ceil_div(heads, rounds), out.stride(0) // VALUE_DIM),
            ctypes.c_float(scale * LOG2_E),
            ctypes.c_int(causal),
            ctypes.c_int(k_rope is not None),
        ),
        grid=min(_most_tiles(q, cu_q) * heads, multiprocessors(q.device)),
        threads=THREADS,
        shared=SHARED,
        device=q.device,
        programmatic=True,
    )


def options_of(dtype: torch.dtype, out_dtype: torch.dtype, merge: bool) -> dict[str, int]:
    """The -D options that hopper.cu describes."""
    return {"KIND": KINDS[dtype], "OUT": OUT[out_dtype], "MERGE": int(merge)}


def _most_tiles(q: Tensor, cu_q: Tensor) -> int:
    """The maximum number of query tiles: the last one of every sequence, and of rows outside of them, may be short."""
    return q.shape[0] // BLOCK_M + cu_q.shape[0] + 1


def _key_bytes(tokens: int) -> int:
    """Bytes of the keys and values of a head."""
    return tokens * 2 * (KEY_DIM + VALUE_DIM)


def _values_map(v: Tensor) -> TensorMap:
    """A `ragged_map` for each head, which is the outermost coordinate: rows beyond a sequence's end are read as 0."""
    (tokens, heads, width), (stride_t, stride_h, _) = v.shape, v.stride()
    around = 2**34 // v.element_size() - stride_t
    return TensorMap(
        "v",
        v,
        (1, 1, 1, BLOCK_N, BOX),
        swizzle=True,
        sizes=(heads, tokens + 1, RAGGED_ROWS + 1, RAGGED_ROWS, width),
        strides=(stride_h, stride_t, around, stride_t, 1),
    )


# ---- what the kernel takes ------------------------------------------------------------------------------------------


def mla_prefill_supports(
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool,
    out_dtype: torch.dtype,
) -> str | None:
    """Why this kernel does not take these arguments, or None."""
    widths = q.shape[2], ROPE_DIM if k_rope is None else k_rope.shape[1], v.shape[2]
    if widths != (KEY_DIM, ROPE_DIM, VALUE_DIM):
        shared = "" if k_rope is None else f" ({widths[1]} shared)"
        return (
            "the kernel takes keys of 192 (64 shared, or none) and values of 128, "
            f"not {widths[0]}{shared} and {widths[2]}"
        )
    if q.dtype not in KINDS or out_dtype not in (q.dtype, torch.float32):
        return f"the kernel takes bf16 and fp16, and returns that or fp32, not {q.dtype} and {out_dtype}"
    if not scale > 0:
        return f"the kernel takes a scale above 0, not {scale}"
    for name, x in (("q", q), ("k", k), ("k_rope", k_rope), ("v", v)):
        if x is None:
            continue
        strides = [stride * x.element_size() for stride in x.stride()[:-1]]
        if x.stride(-1) != 1 or x.data_ptr() % 16 or any(stride % 16 or not 0 < stride < 2**34 for stride in strides):
            return f"the rows of {name} must be aligned to 16 bytes and apart, its strides are {x.stride()}"
    if max(q.shape[0], k.shape[0]) >= RAGGED_ROWS or _most_tiles(q, cu_q) * q.shape[1] >= 2**31:
        return f"the kernel takes fewer than 2^30 rows and 2^31 tiles, got {q.shape[0]} and {k.shape[0]} rows"
    return reason_against_cuda()


def mla_prefill_some_supports(
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> str | None:
    """Why this kernel does not take these arguments, or None."""
    if (
        out.stride()[1:] != (VALUE_DIM, 1)
        or out.stride(0) % VALUE_DIM
        or out.data_ptr() % 16
        or not lse.is_contiguous()
    ):
        return f"the kernel writes rows of whole heads, the strides of out are {out.stride()}, of lse {lse.stride()}"
    return mla_prefill_supports(q, k, k_rope, v, cu_q, cu_k, scale, True, out.dtype)


def mla_prefill_onto_supports(
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> str | None:
    """Why this kernel does not take these arguments, or None."""
    if out.dtype != torch.float32 or not out.is_contiguous() or not lse.is_contiguous():
        return f"the kernel adds to contiguous fp32 only, out is {out.dtype} with strides {out.stride()}"
    return mla_prefill_supports(q, k, k_rope, v, cu_q, cu_k, scale, False, out.dtype)
