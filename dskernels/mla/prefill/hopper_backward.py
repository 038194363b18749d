"""Launchers of hopper_backward.cu, the gradient of prefill for sm_90a, in CUDA C++.

It is CUDA C++ because Gluon has neither named barriers, by which two warpgroups pass ds to each other and dq to the
warps that add it, nor TMA reductions.

Workspace, in addition to the gradients: dq in fp32, 768 bytes for each query and head, and 512 more for each 64 queries
of a head, for lse and delta; if the rope part of the keys is shared, its gradient for each head in fp32, 256 bytes for
each key and head. Sizes that are linear in tokens count one block of 64 queries more for each sequence, and 2 more in
all.
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

SOURCE = Path(__file__).with_name("hopper_backward.cu")
QK_DIM, V_DIM, ROPE_DIM = 192, 128, 64
ROWS, KEYS = 64, 128  # queries in a block, and keys in a tile
THREADS, PREPARE_THREADS, FINISH_THREADS = 384, 128, 256
KINDS = {torch.bfloat16: 0, torch.float16: 1}
DQ_FLOATS = ROWS * QK_DIM
# Queries of all heads whose tiles are computed at one time. The tiles in flight are spread over about half of them, 46
# MB of q, dout and dq, which the L2 holds. With fewer, the tiles of a head begin less than 10 us apart, while each may
# add to a block of dq only 3 us after the one before: 1, 4, 8 and 16 heads of 4,096 took 8.9, 4.1, 4.1 and 3.9 ms.
TOGETHER = 65536


def shared_bytes() -> int:
    """Shared memory of a CTA of `differentiate`: k, v, two stages of q, dout and their statistics, ds, dq, barriers."""
    stage = ROWS * (QK_DIM + V_DIM) * 2 + 2 * ROWS * 4
    return KEYS * (QK_DIM + V_DIM) * 2 + 2 * stage + KEYS * ROWS * 2 + DQ_FLOATS * 4 + 64 + 88


def mla_prefill_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, k_rope (empty if there is none) and v, with the same bits each time."""
    (tokens_q, heads, _), (tokens_k, heads_k, _) = q.shape, k.shape
    if 0 in (tokens_q, tokens_k, heads):
        dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
        return dq, dk, k.new_empty(0) if k_rope is None else k_rope.new_zeros(k_rope.shape), dv
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dout = dout if _reason_against_rows("dout", dout) is None else dout.contiguous()
    out, lse, dlse = out.contiguous(), lse.contiguous(), dlse.contiguous()
    blocks = heads * (tokens_q // ROWS + cu_q.shape[0] + 1)
    sums = empty(q, (blocks, DQ_FLOATS), torch.float32)
    stats = empty(q, (blocks, 2 * ROWS), torch.float32)
    turns = empty(q, (blocks + 1 + cu_k.shape[0],), torch.int32)  # and more, see `turns` in hopper_backward.cu
    rope = None if k_rope is None else empty(q, (tokens_k, heads_k, ROPE_DIM), torch.float32)
    prepare(dout, dlse, out, lse, cu_q, cu_k, stats, turns, heads_k, tokens_k, causal)
    differentiate(dout, q, k, k_rope, v, cu_q, stats, sums, turns, dk, rope, dv, scale, causal)
    finish(sums, cu_q, turns, dq, heads_k, tokens_k, scale, causal)
    return dq, dk, k.new_empty(0) if rope is None else rope.sum(1).to(k.dtype), dv


class Sizes(ctypes.Structure):
    """The struct of this name in hopper_backward.cu."""

    _fields_ = [(name, ctypes.c_int) for name in ("tokens_q", "tokens_k", "sequences", "heads", "heads_k", "causal")]


def options_of(dtype: torch.dtype) -> dict[str, int]:
    """The -D options that hopper_backward.cu describes."""
    return {"KIND": KINDS[dtype]}


@Planned
def prepare(
    dout: Tensor,
    dlse: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    stats: Tensor,
    turns: Tensor,
    heads_k: int,
    tokens_k: int,
    causal: bool,
) -> Plan:
    """Fill `stats` with lse and delta of each block of queries, and `turns` with what the other kernels start from."""
    tokens, heads, _ = out.shape
    return Plan(
        kernel(SOURCE, "prepare", options_of(out.dtype), 0, out.device.index),
        arguments=(
            *map(Pointer, ("dout", "dlse", "out", "lse", "cu_q", "cu_k", "stats", "turns")),
            *map(ctypes.c_longlong, (*dout.stride()[:2], *out.stride()[:2])),
            Sizes(tokens, tokens_k, cu_q.shape[0] - 1, heads, heads_k, causal),
        ),
        grid=heads * (tokens // ROWS + cu_q.shape[0] + 1) + 1,
        threads=PREPARE_THREADS,
        shared=0,
        device=out.device,
    )


@Planned
def differentiate(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    stats: Tensor,
    sums: Tensor,
    turns: Tensor,
    dk: Tensor,
    rope: Tensor | None,
    dv: Tensor,
    scale: float,
    causal: bool,
) -> Plan:
    """Fill `dk`, `dv` and `rope` (the rope part of dk for each head), and add dq, not yet scaled, to `sums`."""
    (tokens_q, heads, _), (tokens_k, heads_k, _) = q.shape, k.shape
    options, shared = options_of(q.dtype), shared_bytes()
    sequences = cu_q.shape[0] - 1
    together = min(max(TOGETHER * sequences // tokens_q, 1), heads_k)
    k_map = head_map("k", k, (KEYS, 32), swizzle=64)
    return Plan(
        kernel(SOURCE, "differentiate", options, shared, q.device.index),
        arguments=(
            head_map("q", q, (ROWS, 64)),
            k_map,
            k_map if k_rope is None else head_map("k_rope", k_rope[:, None], (KEYS, 32), swizzle=64),
            head_map("v", v, (KEYS, 64)),
            head_map("dout", dout, (ROWS, 64)),
            *map(Pointer, ("cu_q", "stats", "sums", "turns")),
            *map(Pointer, ("dk", "dv", "rope")),
            *map(ctypes.c_longlong, (*dk.stride()[:2], *dv.stride()[:2])),
            Sizes(tokens_q, tokens_k, sequences, heads, heads_k, causal),
            ctypes.c_float(scale),
            ctypes.c_int(together),
            ctypes.c_int(k_rope is not None),
        ),
        grid=multiprocessors(q.device),
        threads=THREADS,
        shared=shared,
        device=q.device,
    )


@Planned
def finish(
    sums: Tensor, cu_q: Tensor, turns: Tensor, dq: Tensor, heads_k: int, tokens_k: int, scale: float, causal: bool
) -> Plan:
    """Fill `dq`."""
    tokens, heads, _ = dq.shape
    return Plan(
        kernel(SOURCE, "finish", options_of(dq.dtype), 0, dq.device.index),
        arguments=(
            *map(Pointer, ("sums", "cu_q", "turns", "dq")),
            *map(ctypes.c_longlong, dq.stride()[:2]),
            Sizes(tokens, tokens_k, cu_q.shape[0] - 1, heads, heads_k, causal),
            ctypes.c_float(scale),
        ),
        grid=heads * (tokens // ROWS + cu_q.shape[0] + 1),
        threads=FINISH_THREADS,
        shared=0,
        device=dq.device,
    )


def head_map(name: str, x: Tensor, box: tuple[int, int], swizzle: bool | int = True) -> TensorMap:
    """Map of `x` [rows, heads, columns] for `tma_load_ragged` in ptx.cuh: a copy ends where its sequence does."""
    rows, heads, columns = x.shape
    stride = x.stride(0) if rows > 1 else heads * columns
    around = 2**34 // x.element_size() - stride  # see `ragged_map`
    return TensorMap(
        name,
        x,
        (1, 1, 1, *box),
        swizzle,
        sizes=(heads, rows + 1, RAGGED_ROWS + 1, RAGGED_ROWS, columns),
        strides=(x.stride(1) if heads > 1 else columns, stride, around, stride, 1),
    )


# ---- what the kernel takes ------------------------------------------------------------------------------------------


def mla_prefill_backward_supports(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool,
) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    if q.dtype not in KINDS or out.dtype != q.dtype:
        return f"the kernel takes bf16 and fp16, not {q.dtype} with an output in {out.dtype}"
    if (q.shape[2], v.shape[2]) != (QK_DIM, V_DIM) or (k_rope is not None and k_rope.shape[1] != ROPE_DIM):
        rope = 0 if k_rope is None else k_rope.shape[1]
        return (
            f"the kernel takes keys of {QK_DIM}, {ROPE_DIM} or none of them shared, and values of {V_DIM}; "
            f"not {q.shape[2]}, {rope} and {v.shape[2]}"
        )
    for name, x in (("q", q), ("k", k), ("v", v), ("k_rope", k_rope)):
        if x is not None and (reason := _reason_against_rows(name, x)):
            return reason
    tokens = max(q.shape[0], k.shape[0])
    if tokens >= RAGGED_ROWS or q.shape[1] * (tokens // ROWS + cu_q.shape[0] + 1) >= 2**31 - 1024:
        return "the kernel takes fewer than 2^30 tokens, and than 2^31 blocks of 64 of them and of a head"
    return reason_against_cuda()


def _reason_against_rows(name: str, x: Tensor) -> str | None:
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    if math.prod(x.shape) and (
        x.stride(-1) != 1 or x.data_ptr() % 16 or any(stride % 8 or not 0 < stride < 2**31 for stride in strides)
    ):
        return f"the rows of {name} must be aligned to 16 bytes and apart, its strides are {x.stride()}"
    return None
