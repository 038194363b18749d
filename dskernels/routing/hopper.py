"""Launchers of hopper.cu and hopper_backward.cu, the choice of experts and its gradient for sm_90a, in CUDA C++.

It is CUDA C++ because Triton has neither the vote nor the reduction of a whole warp, which find candidates and their
places: it takes the best experts one by one, each with two shuffle reductions. On an H200, 256 experts in 8 groups, in
a CUDA graph, with Triton's time (including two launches that zero counters) first: 6.0 us and 2.2 for one token, 16.8
and 4.6 for 4,096, 26.2 and 6.4 for 8,192, 85.8 and 16.5 for 32,768; the gradient 5.9 and 2.9, 9.3 and 4.4, 29.6 and
14.4.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dskernels.cuda.compiler import kernel, reason_against_cuda
from dskernels.cuda.driver import Plan, Planned, Pointer, Word
from dskernels.device import empty, multiprocessors
from dskernels.recording import Recorded
from dskernels.routing.config import (
    MAX_EXPERTS,
    MAX_HOPPER_CHOICES,
    HopperConfig,
    choose_hopper_config,
    experts_a_lane,
)
from dskernels.routing.triton_gate import gate_parts
from dskernels.validate import ceil_div

SOURCE = Path(__file__).with_name("hopper.cu")
BACKWARD_SOURCE = Path(__file__).with_name("hopper_backward.cu")
DTYPE = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
BACKWARD_WARPS = 8
# Launches of several blocks that may run at the same time, including captured ones: 256 KB.
ARRIVALS = 1 << 16

_launches = itertools.count()
_slots: dict[tuple[int, int], int] = {}


def _slot(device: int) -> int:
    """The word of `arrivals` (hopper.cu) in which a launch counts its blocks: different from that of any launch that
    may run at the same time.

    Launches on one stream follow each other and share a word. A captured launch gets its own, since the graph may be
    replayed next to anything.
    """
    if torch._C._cuda_isCurrentStreamCapturing():
        return next(_launches) % ARRIVALS
    key = device, torch._C._cuda_getCurrentRawStream(device)
    slot = _slots.get(key)
    if slot is None:
        slot = _slots[key] = next(_launches) % ARRIVALS
    return slot


# ---- forward ---------------------------------------------------------------------------------------------------------


@Planned
def _launch_route(
    logits: Tensor,
    bias: Tensor | None,
    physical: Tensor | None,
    top_k: int,
    n_groups: int,
    top_groups: int,
    softmax: bool,
    normalize: bool,
    scale: float,
    weights: Tensor,
    experts: Tensor,
    placed: Tensor | None,
    sums: Tensor | None,
    load: Tensor,
    nonfinite: Tensor,
) -> Plan:
    """Fill the results.

    `logits` is [T, E], or with `sums` [parts, T, E] of which the sum goes there.
    """
    (T, E), parts = logits.shape[-2:], 0 if sums is None else logits.shape[0]
    if top_groups == n_groups:
        n_groups = top_groups = 1
    config = choose_hopper_config(T, experts_a_lane(E, n_groups), multiprocessors(logits.device))
    chosen = options(
        config,
        E,
        top_k,
        n_groups,
        top_groups,
        softmax=softmax,
        normalize=normalize,
        bias=bias is not None,
        dtype=logits.dtype,
        vector=_vector(E, n_groups, logits, bias, sums),
        parts=sums is not None,
        replicas=physical is not None,
    )
    return Plan(
        kernel(SOURCE, "route", chosen, 0, logits.device.index),
        arguments=(
            *map(Pointer, ("logits", "bias", "physical", "weights", "experts", "placed", "sums", "load", "nonfinite")),
            ctypes.c_ulonglong(0) if config.blocks == 1 else Word(functools.partial(_slot, logits.device.index)),
            ctypes.c_longlong(logits.stride(-2)),
            *map(ctypes.c_int, (T, config.rows, parts, 0 if physical is None else physical.shape[1])),
            ctypes.c_float(scale),
        ),
        grid=config.blocks,
        threads=32 * config.warps,
        shared=0,
        device=logits.device,
        programmatic=True,
    )


def options(
    config: HopperConfig,
    n_experts: int,
    top_k: int,
    n_groups: int,
    top_groups: int,
    *,
    softmax: bool,
    normalize: bool,
    bias: bool,
    dtype: torch.dtype,
    vector: int,
    parts: bool = False,
    replicas: bool = False,
) -> dict[str, int]:
    """The -D options that hopper.cu describes."""
    return {
        "E": n_experts,
        "TOP_K": top_k,
        "N_GROUPS": n_groups,
        "TOP_GROUPS": top_groups,
        "SOFTMAX": int(softmax),
        "NORMALIZE": int(normalize),
        "HAS_BIAS": int(bias),
        "DTYPE": DTYPE[dtype],
        "VECTOR": vector,
        "PARTS": int(parts),
        "REPLICAS": int(replicas),
        "MOST_THREADS": 32 * config.most_warps,
        "BLOCKS": config.resident,
        "ARRIVALS": ARRIVALS,
    }


def _vector(n_experts: int, n_groups: int, logits: Tensor, *others: Tensor | None) -> int:
    """The most logits per load: what a lane holds of a group has to be a whole number of aligned loads."""
    size = n_experts // n_groups
    held = size if n_groups > 32 else experts_a_lane(n_experts, n_groups)
    rows = [logits.stride(i) for i in range(logits.dim() - 1)]
    vector = 16 // logits.element_size()
    while vector > 1 and (
        any(n % vector for n in (size, held, *rows))
        or logits.data_ptr() % (vector * logits.element_size())
        or any(x is not None and x.data_ptr() % min(16, vector * x.element_size()) for x in others)
    ):
        vector //= 2
    return vector


def _routed(logits: Tensor, bias: Tensor | None, physical: Tensor | None, values: tuple, *, parts: bool) -> tuple:
    """(weights, experts, placed, sums, load, nonfinite); `placed` and `sums` do not always exist."""
    (T, E), top_k = logits.shape[-2:], values[0]
    results = (
        empty(logits, (T, top_k), torch.float32),
        empty(logits, (T, top_k), torch.int32),
        None if physical is None else empty(logits, (T, top_k), torch.int32),
        empty(logits, (T, E), torch.float32) if parts else None,
        empty(logits, (E,), torch.int32, (1,)),
        empty(logits, (), torch.int32, ()),
    )
    _launch_route(logits, bias, physical, *values, *results)
    return results


@Recorded
def route(logits: Tensor, bias: Tensor | None, *values: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weights, experts, load, nonfinite) of `logits` [T, E]."""
    weights, experts, _, _, load, nonfinite = _routed(logits, bias, None, values, parts=False)
    return weights, experts, load, nonfinite


@Recorded
def route_replicated(
    logits: Tensor, bias: Tensor | None, physical: Tensor, *values: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(weights, experts, load, nonfinite, placed)."""
    weights, experts, placed, _, load, nonfinite = _routed(logits, bias, physical, values, parts=False)
    return weights, experts, load, nonfinite, placed


@Recorded
def route_hidden(
    x: Tensor, weight: Tensor, bias: Tensor | None, physical: Tensor | None, *values: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(weights, experts, load, nonfinite, logits, placed). The product is portable; its parts are summed here."""
    parts = gate_parts(x, weight)
    whole = parts.shape[0] == 1
    logits = parts[0] if whole else parts
    weights, experts, placed, sums, load, nonfinite = _routed(logits, bias, physical, values, parts=not whole)
    if placed is None:
        placed = empty(x, (0,), torch.int32, (1,))
    return weights, experts, load, nonfinite, logits if whole else sums, placed


def route_supports(
    logits: Tensor, bias: Tensor | None, top_k: int, n_groups: int, top_groups: int, *options: object
) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    return _reason_against(logits.shape[0], logits.shape[1], top_k) or reason_against_cuda()


def route_replicated_supports(
    logits: Tensor, bias: Tensor | None, physical: Tensor, top_k: int, *options: object
) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    return _reason_against(logits.shape[0], logits.shape[1], top_k) or reason_against_cuda()


def route_hidden_supports(
    x: Tensor, weight: Tensor, bias: Tensor | None, physical: Tensor | None, top_k: int, *options: object
) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    return _reason_against(x.shape[0], weight.shape[0], top_k) or reason_against_cuda()


def _reason_against(n_tokens: int, n_experts: int, top_k: int) -> str | None:
    if n_tokens == 0:
        return "there is nothing to choose"
    if n_experts > MAX_EXPERTS:
        return f"a warp holds all experts of a token in registers: at most {MAX_EXPERTS}, got {n_experts}"
    if top_k > MAX_HOPPER_CHOICES:
        return f"a lane takes one choice: at most {MAX_HOPPER_CHOICES} of them, got {top_k}"
    return None


# ---- backward --------------------------------------------------------------------------------------------------------


@Planned
def _launch_backward(
    grad: Tensor,
    logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    softmax: bool,
    normalize: bool,
    scale: float,
    dlogits: Tensor,
) -> Plan:
    """Fill `dlogits` [T, E]."""
    (T, E), top_k = logits.shape, experts.shape[1]
    vector = _row_vector(E, logits if softmax else dlogits)
    chosen = backward_options(E, top_k, softmax=softmax, normalize=normalize, dtype=logits.dtype, vector=vector)
    return Plan(
        kernel(BACKWARD_SOURCE, "route_backward", chosen, 0, logits.device.index),
        arguments=(
            *map(Pointer, ("grad", "logits", "weights", "experts", "dlogits")),
            ctypes.c_longlong(logits.stride(0)),
            ctypes.c_int(T),
            ctypes.c_float(scale),
        ),
        grid=ceil_div(T, BACKWARD_WARPS),
        threads=32 * BACKWARD_WARPS,
        shared=0,
        device=logits.device,
        programmatic=True,
    )


def backward_options(
    n_experts: int, top_k: int, *, softmax: bool, normalize: bool, dtype: torch.dtype, vector: int
) -> dict[str, int]:
    """The -D options that hopper_backward.cu describes; as many blocks per SM as the row's registers allow."""
    return {
        "E": n_experts,
        "TOP_K": top_k,
        "SOFTMAX": int(softmax),
        "NORMALIZE": int(normalize),
        "DTYPE": DTYPE[dtype],
        "VECTOR": vector,
        "MOST_THREADS": 32 * BACKWARD_WARPS,
        "BLOCKS": 6 if n_experts <= 256 else 2,
    }


def _row_vector(n_experts: int, rows: Tensor) -> int:
    """The most elements of a row per load or store."""
    vector = 16 // rows.element_size()
    while vector > 1 and (
        n_experts % vector or rows.stride(0) % vector or rows.data_ptr() % (vector * rows.element_size())
    ):
        vector //= 2
    return vector


@Recorded
def route_backward(grad: Tensor, logits: Tensor, weights: Tensor, experts: Tensor, *values: Any) -> Tensor:
    """Gradient to `logits` [T, E] of the `weights` [T, k] of `experts`."""
    dlogits = empty(logits, tuple(logits.shape), logits.dtype)
    _launch_backward(grad, logits, weights, experts, *values, dlogits)
    return dlogits


def route_backward_supports(
    grad: Tensor, logits: Tensor, weights: Tensor, experts: Tensor, *options: object
) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    return _reason_against(logits.shape[0], logits.shape[1], experts.shape[1]) or reason_against_cuda()
