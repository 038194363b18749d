"""The grouped products on Hopper: the choice of kernels, and the launcher of hopper.cu (e4m3, many rows per group).

Only the device knows the sizes of the groups. So the choice between kernels depends on the average number of rows per
group, and a launch on the shapes alone. Groups need no padding: TMA does not write rows of C beyond the end of a group,
and a warpgroup skips its second 64 rows of a 256-row tile if the group has no rows there.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from dskernels.cuda.compiler import kernel, reason_against_cuda
from dskernels.cuda.driver import Plan, Planned, Pointer
from dskernels.cuda.tensor_map import RAGGED_ROWS, TensorMap, ragged_map, scale_map
from dskernels.device import empty, multiprocessors
from dskernels.gemm.config import HopperConfig
from dskernels.gemm.hopper import THREADS, options_of, shared_bytes
from dskernels.gemm.hopper_small import OUT
from dskernels.grouped_gemm import hopper_half, hopper_small
from dskernels.grouped_gemm.config import (
    choose_hopper_config,
    choose_hopper_masked_config,
    choose_hopper_wgrad_config,
    hopper_clusters,
    use_hopper_small,
    use_hopper_small_masked,
)

SOURCE = Path(__file__).with_name("hopper.cu")
MOST_GROUPS = 1024
TABLE_BYTES = 8 * (MOST_GROUPS + 1)  # bytes of shared memory for the table of groups
ORDER_BYTES = 12 * (MOST_GROUPS + 1)  # the same with `in_units`, where the order of the groups is stored too
UNIT = 64  # rows of A per TMA copy with `in_units`
SCALE_ROWS = 132  # scales of A per TMA copy: those of 128 rows from any row on, starting at a multiple of 4

# ---- implementations of the operations ------------------------------------------------------------------------------


def grouped_gemm(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor | None, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """Product of each row of `a` [T, K] and its group's matrix of `b` [E, N, K]."""
    out = empty(a, (a.shape[0], b.shape[1]), out_dtype)
    grouped_gemm_out(a, a_scale, b, b_scale, offsets, out)
    return out


@Planned
def grouped_gemm_out(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor | None, offsets: Tensor, out: Tensor
) -> Plan:
    """The same, into `out`."""
    if a_scale is None or b_scale is None:
        return hopper_half.grouped_gemm.prepare(a, b, offsets, out)
    if _are_few(a, b):
        return hopper_small.grouped_gemm.prepare(a, a_scale, b, b_scale, offsets, out)
    return plan(_config(a, b), a, a_scale, b, b_scale, offsets, out)


@Planned
def grouped_gemm_leaving(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor | None, offsets: Tensor, out: Tensor
) -> Plan:
    """The same, but rows of `out` that belong to no group are left as they are, unless the rows are few.

    With the tokens of two ranks, half of the rows of an expert block belong to no group, and nobody reads them. Writing
    zeros there took 128 of the 2,220 us of its products in e4m3 (2 x 2,048 tokens on an H200), and 150 of 3,870 in
    bf16.
    """
    if a_scale is None or b_scale is None:
        return hopper_half.grouped_gemm_leaving.prepare(a, b, offsets, out)
    if _are_few(a, b):
        return hopper_small.grouped_gemm.prepare(a, a_scale, b, b_scale, offsets, out)
    return _plan_rows(_config(a, b), a, a_scale, b, b_scale, offsets, out, cleared=0)


def _are_few(a: Tensor, b: Tensor) -> bool:
    """Whether the product is left to the kernel for few rows."""
    return use_hopper_small(a.shape[0], b.shape[0]) and _in_one_piece(b)


def _config(a: Tensor, b: Tensor) -> HopperConfig:
    groups, n, k = b.shape
    return choose_hopper_config(a.shape[0], groups, n, k, multiprocessors(a.device))


@Planned
def grouped_gemm_masked(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor | None, counts: Tensor, out: Tensor
) -> Plan:
    """Fill the first counts[e] rows of `out` [E, M, N] for each e."""
    if a_scale is None or b_scale is None:
        return hopper_half.grouped_gemm_masked.prepare(a, b, counts, out)
    (groups, rows, k), n = a.shape, b.shape[1]
    if use_hopper_small_masked(rows) and _in_one_piece(b):
        return hopper_small.grouped_gemm_masked.prepare(a, a_scale, b, b_scale, counts, out)
    config = choose_hopper_masked_config(rows, groups, n, k, multiprocessors(a.device))
    return plan_masked(config, a, a_scale, b, b_scale, counts, out)


@Planned
def grouped_wgrad(
    dy: Tensor,
    dy_scale: Tensor | None,
    x: Tensor,
    x_scale: Tensor | None,
    offsets: Tensor,
    out: Tensor,
    accumulate: bool,
) -> Plan:
    """Fill `out` [E, N, K] with, or add to it, the products over the tokens of each group.

    Tokens are the columns of e4m3 operands, [N, P] and [K, P], and the rows of others.
    """
    if dy_scale is None or x_scale is None:
        return hopper_half.grouped_wgrad.prepare(dy, x, offsets, out, accumulate)
    groups, n, k = out.shape
    config = choose_hopper_wgrad_config(dy.shape[1], groups, n, k, multiprocessors(dy.device))
    return plan_wgrad(config, dy, dy_scale, x, x_scale, offsets, out, accumulate)


def _in_one_piece(b: Tensor) -> bool:
    """Whether the matrices of `b` follow each other without gaps, as the kernel for few rows requires."""
    return b.shape[0] == 1 or b.stride(0) == b.shape[1] * b.stride(1)


# ---- supported arguments --------------------------------------------------------------------------------------------


def grouped_gemm_supports(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor | None, offsets: Tensor, out_dtype: torch.dtype
) -> str | None:
    """Why these kernels do not take such arguments, or None."""
    out = torch.empty((a.shape[0], b.shape[1]), dtype=out_dtype, device="meta")
    return grouped_gemm_out_supports(a, a_scale, b, b_scale, offsets, out)


def grouped_gemm_out_supports(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor | None, offsets: Tensor, out: Tensor
) -> str | None:
    """Why these kernels do not take such arguments, or None."""
    if a_scale is None or b_scale is None:
        return hopper_half.grouped_gemm_supports(a, b, offsets, out)
    return _reason_against(a, a_scale, b, out)


def grouped_gemm_masked_supports(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor | None, counts: Tensor, out: Tensor
) -> str | None:
    """Why these kernels do not take such arguments, or None."""
    if a_scale is None or b_scale is None:
        return hopper_half.grouped_gemm_masked_supports(a, b, counts, out)
    # For scales, the row index is contiguous. If there is only one group, its stride is arbitrary, because it is not
    # used.
    for name, x, row in (("a", a, a.stride(1)), ("a.scale", a_scale, 1), ("out", out, out.stride(1))):
        if x.shape[0] > 1 and x.stride(0) != x.shape[1] * row:
            return f"the groups of {name} must follow each other without gaps, its strides are {list(x.stride())}"
    return _reason_against(a, a_scale, b, out)


def grouped_wgrad_supports(
    dy: Tensor,
    dy_scale: Tensor | None,
    x: Tensor,
    x_scale: Tensor | None,
    offsets: Tensor,
    out: Tensor,
    accumulate: bool,
) -> str | None:
    """Why these kernels do not take such arguments, or None."""
    if dy_scale is None or x_scale is None:
        return hopper_half.grouped_wgrad_supports(dy, x, offsets, out, accumulate)
    groups, n, k = out.shape
    if n == 0 or k == 0:
        return "there is nothing to multiply"
    if groups > MOST_GROUPS:
        return f"the kernel takes at most {MOST_GROUPS} groups, and there are {groups}"
    if accumulate and out.dtype != torch.float32:
        return f"the kernel adds to fp32 only, and out is {out.dtype}"
    return _reason_against_rows(dy=dy, x=x, out=out) or _reason_against_scales(dy_scale, x_scale)


def _reason_against(a: Tensor, a_scale: Tensor, b: Tensor, out: Tensor) -> str | None:
    groups, n, k = b.shape
    rows = a.shape[:-1].numel()
    if rows == 0 or n == 0 or k == 0:
        return "there is nothing to multiply"
    if groups > MOST_GROUPS or rows >= RAGGED_ROWS:
        return f"the kernel takes at most {MOST_GROUPS} groups and fewer than 2^30 rows, got {groups} and {rows}"
    step = b.stride(0) // b.stride(1) if b.stride(1) else 0
    if groups > 1 and (step < n or step * b.stride(1) != b.stride(0) or groups * step >= 2**31):
        return f"the matrices of b must be whole rows apart, and 2^31 at most, its strides are {list(b.stride())}"
    return _reason_against_rows(a=a, b=b, out=out) or _reason_against_scales(a_scale)


def _reason_against_rows(**tensors: Tensor) -> str | None:
    for name, x in tensors.items():
        if x.stride(-1) != 1 or x.data_ptr() % 16 or any(s * x.element_size() % 16 for s in x.stride()[:-1]):
            return f"the rows of {name} must be aligned to 16 bytes, its strides are {list(x.stride())}"
    return None


def _reason_against_scales(*scales: Tensor) -> str | None:
    if any(scale.data_ptr() % 16 for scale in scales):
        return "the scales must be aligned to 16 bytes"
    return reason_against_cuda()


# ---- launches -------------------------------------------------------------------------------------------------------


def plan(
    config: HopperConfig, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor
) -> Plan:
    """The launch for a given config, for groups that follow each other in one matrix of rows."""
    return _plan_rows(config, a, a_scale, b, b_scale, offsets, out, cleared=a.shape[0])


def _plan_rows(
    config: HopperConfig,
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    out: Tensor,
    cleared: int,
) -> Plan:
    """The same; among the first `cleared` rows, those that belong to no group become zero."""
    clusters = hopper_clusters(config, a.shape[0], b.shape[0], b.shape[1])
    return _plan(config, a, a_scale, b, b_scale, a.shape[0], Pointer("offsets"), out, clusters, cleared)


def plan_masked(
    config: HopperConfig, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out: Tensor
) -> Plan:
    """The launch for a given config, for groups that have a buffer of rows each."""
    clusters = b.shape[0] * config.clusters(a.shape[1], b.shape[1])
    rows = a.shape[1]
    a, a_scale, out = (x.flatten(0, 1) for x in (a, a_scale, out))
    return _plan(config, a, a_scale, b, b_scale, rows, Pointer("counts"), out, clusters)


def _plan(
    config: HopperConfig,
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    rows: int,
    sizes: Pointer,
    out: Tensor,
    clusters: int,
    cleared: int = 0,
) -> Plan:
    """The launch for two-dimensional `a` and `out`. `rows` is the number of rows of `a`, or of each group's buffer."""
    groups, n, k = b.shape
    step = b.stride(0) // b.stride(1) if groups > 1 else n
    b_rows = b.as_strided(((groups - 1) * step + n, k), (b.stride(1), 1))
    options = options_for(config, 128, OUT[out.dtype], masked=sizes.name == "counts")
    shared = rows_shared_bytes(config)
    return Plan(
        kernel(SOURCE, "grouped_gemm", options, shared, a.device.index),
        arguments=(
            TensorMap("a", a, (UNIT if config.in_units else config.block_m, 128), swizzle=True),
            TensorMap("b", b_rows, (config.block_n, 128), swizzle=True),
            scale_map("a_scale", a_scale, SCALE_ROWS),
            ragged_map("out", out, (64, 128 // out.element_size())),
            Pointer("b_scale"),
            sizes,
            Pointer("out"),
            *map(
                ctypes.c_int, (groups, rows, n, k, step, b_scale.stride(0), b_scale.stride(1), out.stride(0), cleared)
            ),
        ),
        grid=min(clusters, multiprocessors(a.device) // config.cluster) * config.cluster,
        threads=THREADS,
        shared=shared,
        device=a.device,
    )


def plan_wgrad(
    config: HopperConfig,
    dy: Tensor,
    dy_scale: Tensor,
    x: Tensor,
    x_scale: Tensor,
    offsets: Tensor,
    out: Tensor,
    accumulate: bool,
) -> Plan:
    """The launch for a given config, for sums along the columns of groups."""
    groups, n, k = out.shape
    shared = wgrad_shared_bytes(config)
    options = options_for(config, 1, OUT[out.dtype], accumulate=accumulate)
    return Plan(
        kernel(SOURCE, "grouped_wgrad", options, shared, dy.device.index),
        arguments=(
            TensorMap("dy", dy, (config.block_m, 128), swizzle=True),
            TensorMap("x", x, (config.block_n, 128), swizzle=True),
            scale_map("dy_scale", dy_scale, config.block_m),
            scale_map("x_scale", x_scale, config.block_n),
            TensorMap("out", out, (1, 64, 128 // out.element_size()), swizzle=True),
            Pointer("offsets"),
            *map(ctypes.c_int, (groups, dy.shape[1], n, k)),
        ),
        grid=min(groups * config.clusters(n, k), multiprocessors(dy.device) // config.cluster) * config.cluster,
        threads=THREADS,
        shared=shared,
        device=dy.device,
    )


def rows_shared_bytes(config: HopperConfig) -> int:
    """Bytes of shared memory of a CTA of `plan`: as for the dense product, but 640 bytes for each copy of scales, and
    the table of groups."""
    table = ORDER_BYTES if config.in_units else TABLE_BYTES
    return shared_bytes(config, 128, False) + config.stages * config.waves * (640 - 512) + table


def wgrad_shared_bytes(config: HopperConfig) -> int:
    """Bytes of shared memory of a CTA of `plan_wgrad`."""
    return shared_bytes(config, 1, False) + TABLE_BYTES


def options_for(
    config: HopperConfig, b_rows: int, out: int, *, accumulate: bool = False, masked: bool = False
) -> dict[str, int]:
    """The -D options, which cuda/fp8_gemm.cuh and hopper.cu describe."""
    return options_of(config, b_rows, out, bias=0, accumulate=int(accumulate), direct=0) | {
        "MASKED": int(masked),
        "IN_UNITS": int(config.in_units),
    }
