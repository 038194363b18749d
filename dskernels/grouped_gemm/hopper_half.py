"""Launchers of hopper_half.cu, the grouped products of bf16 and fp16 for sm_90a, in CUDA C++.

It is CUDA C++ because Gluon has no clusters, which let two tiles share what they load, and because of how a group ends:
a TMA copy through a ragged map stops at the end of the group, wherever its box ends. So groups may begin at any row,
without padding.

Speed relative to `torch._grouped_mm` in the same run, for bf16, from three runs on an H100. 8 groups of 4,096 rows:
1.02 to 1.07 forward (694 to 722 TFLOP/s); 1.02 to 1.03 for the gradient of `a`; for that of the weights 0.996 to 1.009
in fp32, where torch writes bf16, and 1.03 to 1.05 in bf16. 32 groups of about 190 rows: 1.06. 32 groups of 20 rows:
1.08 to 1.10, at 2.9 TB/s.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dskernels.cuda.compiler import kernel, reason_against_cuda
from dskernels.cuda.driver import Plan, Planned, Pointer
from dskernels.cuda.tensor_map import RAGGED_ROWS, TensorMap, ragged_map
from dskernels.device import multiprocessors
from dskernels.gemm.config import SHARED_LIMIT
from dskernels.gemm.hopper import THREADS
from dskernels.gemm.hopper_small import OUT
from dskernels.grouped_gemm.config import tile_bound
from dskernels.validate import ceil_div

SOURCE = Path(__file__).with_name("hopper_half.cu")
BLOCK_M = 128
GROUP, UNROLL = 8, 2  # GROUP from 4 to 16 and UNROLL from 1 to 4 were within 0.2%
KINDS = {torch.bfloat16: 0, torch.float16: 1}
CONTIGUOUS, MASKED, WGRAD = 0, 1, 2  # values of the option FORM


@dataclass(frozen=True)
class HalfConfig:
    """Tile of 128 rows by `block_n` columns. `clocks` is the time of 64 of K, which shared memory determines."""

    block_n: int
    clocks: int

    def pairs(self, groups: int, rows: int, columns: int) -> int:
        """How many pairs of tiles cover `groups` matrices.

        Tiles of a pair are adjacent along M or, in a last, odd row of tiles, along N.
        """
        tall, wide = ceil_div(rows, BLOCK_M), ceil_div(columns, self.block_n)
        return groups * (tall // 2 * wide + tall % 2 * ceil_div(wide, 2))

    def stages(self, groups: int) -> int:
        """Pipeline stages, the blocks of K in flight: as many as fit, at most 6."""
        return min((SHARED_LIMIT - self.shared_bytes(0, groups)) // (self.stage + 16), 6)

    def shared_bytes(self, stages: int, groups: int) -> int:
        """Bytes of shared memory of a CTA, as laid out in cuda/half_gemm.cuh and cuda/groups.cuh."""
        return stages * (self.stage + 16) + 4 * 64 * 128 + 8 * (groups + 1)

    @property
    def stage(self) -> int:
        """Bytes of a stage: the tiles of A and B of one block of K."""
        return (BLOCK_M + self.block_n) * 64 * 2


CONFIGS = (HalfConfig(256, clocks=1024), HalfConfig(192, clocks=832), HalfConfig(128, clocks=640))
MOST_GROUPS = 4096  # with this many, 3 stages of the largest tile still fit


def choose_config(groups: int, rows: int, columns: int, multiprocessors: int) -> HalfConfig:
    """Config with the fewest clocks per 64 of K, for `groups` matrices of `rows` rows and `columns` columns."""

    def clocks(config: HalfConfig) -> int:
        return ceil_div(config.pairs(groups, rows, columns), multiprocessors // 2) * config.clocks

    return min(CONFIGS, key=clocks)


# ---- products -------------------------------------------------------------------------------------------------------


@Planned
def grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor) -> Plan:
    """Fill `out` [T, N] with the product of each row of `a` [T, K] and its group's matrix of `b` [E, N, K]."""
    return plan(_config(a, b), a, b, offsets, out)


@Planned
def grouped_gemm_leaving(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor) -> Plan:
    """The same, but rows that belong to no group are left as they are."""
    return _plan_rows(_config(a, b), a, b, offsets, out, cleared=0)


@Planned
def grouped_gemm_masked(a: Tensor, b: Tensor, counts: Tensor, out: Tensor) -> Plan:
    """Fill the first counts[e] rows of `out` [E, M, N] for each e, with products of `a` [E, M, K] and `b` [E, N, K]."""
    groups, rows, n = out.shape
    config = choose_config(groups, rows, n, multiprocessors(a.device))
    return plan_masked(config, a, b, counts, out)


@Planned
def grouped_wgrad(dy: Tensor, x: Tensor, offsets: Tensor, out: Tensor, accumulate: bool) -> Plan:
    """Fill `out` [E, N, K] with, or add to it, dy[rows of e].T @ x[rows of e] of `dy` [T, N] and `x` [T, K]."""
    groups, n, k = out.shape
    config = choose_config(groups, n, k, multiprocessors(dy.device))
    return plan_wgrad(config, dy, x, offsets, out, accumulate)


def plan(config: HalfConfig, a: Tensor, b: Tensor, offsets: Tensor, out: Tensor) -> Plan:
    """The launch of `grouped_gemm` for a given config."""
    return _plan_rows(config, a, b, offsets, out, cleared=a.shape[0])


def _config(a: Tensor, b: Tensor) -> HalfConfig:
    rows, (groups, n, _) = a.shape[0], b.shape
    filled = min(rows, groups)  # the most groups that can have rows; only the device knows the actual sizes
    return choose_config(filled, ceil_div(rows, filled), n, multiprocessors(a.device))


def _plan_rows(config: HalfConfig, a: Tensor, b: Tensor, offsets: Tensor, out: Tensor, cleared: int) -> Plan:
    """The launch for groups that follow each other in one matrix of rows. Among the first `cleared` rows, those that
    belong to no group become zero."""
    rows, (groups, n, k) = a.shape[0], b.shape
    return _plan(
        config,
        CONTIGUOUS,
        rows_map("a", a[None]),
        *_weights(b, config),
        ragged_map("out", out, (64, 128 // out.element_size())),
        sizes="offsets",
        out=out[None],
        shape=(groups, rows, cleared, n, k),
        pairs=config.pairs(tile_bound(rows, groups, BLOCK_M), 1, n),
    )


def plan_masked(config: HalfConfig, a: Tensor, b: Tensor, counts: Tensor, out: Tensor) -> Plan:
    """The launch of `grouped_gemm_masked` for a given config."""
    (groups, rows, n), k = out.shape, a.shape[2]
    return _plan(
        config,
        MASKED,
        rows_map("a", a),
        *_weights(b, config),
        _out_map(out),
        sizes="counts",
        out=out,
        shape=(groups, rows, 0, n, k),
        pairs=config.pairs(groups, rows, n),
    )


def plan_wgrad(config: HalfConfig, dy: Tensor, x: Tensor, offsets: Tensor, out: Tensor, accumulate: bool) -> Plan:
    """The launch of `grouped_wgrad` for a given config."""
    groups, n, k = out.shape
    return _plan(
        config,
        WGRAD,
        ragged_map("dy", dy, (64, 64)),
        ragged_map("x", x, (64, 64)),
        1,
        _out_map(out),
        sizes="offsets",
        out=out,
        shape=(groups, dy.shape[0], n, k, 0),
        pairs=config.pairs(groups, n, k),
        accumulate=accumulate,
    )


def _plan(
    config: HalfConfig,
    form: int,
    a_map: TensorMap,
    b_map: TensorMap,
    b_mn: int,
    out_map: TensorMap,
    *,
    sizes: str,
    out: Tensor,
    shape: tuple[int, ...],
    pairs: int,
    accumulate: bool = False,
) -> Plan:
    """The launch. `shape` has the kernel's last arguments; `pairs` is the most pairs of tiles that there can be."""
    groups = shape[0]
    stages = config.stages(groups)
    shared = config.shared_bytes(stages, groups)
    options = options_of(config, stages, form, KINDS[a_map.x.dtype], b_mn, OUT[out.dtype], int(accumulate))
    return Plan(
        kernel(SOURCE, "grouped_half", options, shared, out.device.index),
        arguments=(
            a_map,
            b_map,
            out_map,
            Pointer(sizes),
            Pointer("out"),
            *(ctypes.c_longlong(stride * out.element_size()) for stride in out.stride()[:2]),
            *map(ctypes.c_int, shape),
        ),
        grid=2 * min(pairs, multiprocessors(out.device) // 2),
        threads=THREADS,
        shared=shared,
        device=out.device,
    )


def options_of(
    config: HalfConfig, stages: int, form: int, kind: int, b_mn: int, out: int, accumulate: int
) -> dict[str, int]:
    """The -D options, which cuda/half_gemm.cuh and hopper_half.cu describe."""
    return {
        "KIND": kind,
        "A_MN": int(form == WGRAD),
        "B_MN": b_mn,
        "BLOCK_N": config.block_n,
        "STAGES": stages,
        "UNROLL": UNROLL,
        "OUT": out,
        "ACCUMULATE": accumulate,
        "FORM": form,
        "GROUP": GROUP,
    }


def rows_map(name: str, x: Tensor, rows: int = 64) -> TensorMap:
    """Tensor map of a stack of matrices, with boxes of `rows` rows and 64 columns."""
    return TensorMap(name, x, (1, rows, 64), swizzle=True)


def _weights(b: Tensor, config: HalfConfig) -> tuple[TensorMap, int]:
    """Tensor map of `b` [E, N, K], and the option B_MN: 1 if `b` is contiguous along N, as in the gradient of `a`."""
    if b.stride(2) == 1:
        return rows_map("b", b, config.block_n // 2), 0
    return rows_map("b", b.mT), 1


def _out_map(out: Tensor) -> TensorMap:
    return TensorMap("out", out, (1, 64, 128 // out.element_size()), swizzle=True)


# ---- supported arguments --------------------------------------------------------------------------------------------


def grouped_gemm_supports(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor) -> str | None:
    """Why this kernel does not take these arguments, or None."""
    return _reason(a.shape[0], b.shape[0], a=a, b=b if b.stride(2) == 1 else b.mT, out=out)


def grouped_gemm_masked_supports(a: Tensor, b: Tensor, counts: Tensor, out: Tensor) -> str | None:
    """Why this kernel does not take these arguments, or None."""
    return _reason(a.shape[1], b.shape[0], a=a, b=b if b.stride(2) == 1 else b.mT, out=out)


def grouped_wgrad_supports(dy: Tensor, x: Tensor, offsets: Tensor, out: Tensor, accumulate: bool) -> str | None:
    """Why this kernel does not take these arguments, or None."""
    if accumulate and out.dtype != torch.float32:
        return f"the kernel adds to fp32 only, out is {out.dtype}"
    return _reason(dy.shape[0], out.shape[0], dy=dy, x=x, out=out)


def _reason(rows: int, groups: int, **tensors: Tensor) -> str | None:
    for name, x in tensors.items():
        if x.numel() == 0:
            return f"there is nothing to multiply, {name} has shape {list(x.shape)}"
        if name != "out" and x.dtype not in KINDS:
            return f"the kernel multiplies bf16 and fp16, {name} is {x.dtype}"
        strides = [stride * x.element_size() for stride in x.stride()[:-1]]
        if x.stride(-1) != 1 or x.data_ptr() % 16 or any(stride % 16 or not stride for stride in strides):
            return f"the rows of {name} must be aligned to 16 bytes and apart, its strides are {x.stride()}"
    if groups > MOST_GROUPS or rows >= RAGGED_ROWS:
        return f"the kernel takes at most {MOST_GROUPS} groups and fewer than 2^30 rows, got {groups} and {rows}"
    return reason_against_cuda()
