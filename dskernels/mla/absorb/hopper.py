"""Launcher of hopper.cu: absorbed queries on sm_90a, in CUDA C++."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from dskernels.cuda.compiler import kernel, reason_against_cuda
from dskernels.cuda.driver import Plan, Planned, Pointer
from dskernels.cuda.tensor_map import TensorMap
from dskernels.device import empty, multiprocessors
from dskernels.mla.absorb.config import LATENT, NOPE, ROPE, HopperConfig, choose_hopper
from dskernels.validate import ceil_div

SOURCE = Path(__file__).with_name("hopper.cu")
KINDS = {torch.bfloat16: 0, torch.float16: 1}


def mla_decode_queries(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries [T, H, latent + rope] of `q` [T, H, nope + rope] and `w_uk` [H, nope, latent]."""
    out = empty(q, (q.shape[0], q.shape[1], LATENT + ROPE), q.dtype)
    _mla_decode_queries(q, w_uk, cos, sin, out)
    return out


@Planned
def _mla_decode_queries(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Plan:
    config = choose_hopper(q.shape[0], q.shape[1], multiprocessors(q.device))
    return plan(config, q, w_uk, cos, sin, out)


def plan(config: HopperConfig, q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Plan:
    """The launch for a given config."""
    tokens, heads, _ = q.shape
    box = (config.tokens, 1, 64)
    return Plan(
        kernel(SOURCE, "mla_decode_queries", options_of(config, KINDS[q.dtype]), config.shared, q.device.index),
        arguments=(
            TensorMap("q", q, box, swizzle=True, strides=_strides(q)),
            TensorMap("w_uk", w_uk, (1, NOPE, 64), swizzle=True, strides=_strides(w_uk)),
            TensorMap("out", out, box, swizzle=True),
            *map(Pointer, ("q", "cos", "sin", "out")),
            *map(ctypes.c_longlong, (q.stride(0), q.stride(1), cos.stride(0), sin.stride(0))),
            *map(ctypes.c_int, (tokens, heads)),
        ),
        grid=(heads * LATENT // config.span, ceil_div(tokens, config.tokens), 1),
        threads=config.threads,
        shared=config.shared,
        device=q.device,
        programmatic=True,
    )


def options_of(config: HopperConfig, out: int) -> dict[str, int]:
    """The options that hopper.cu is specialised by."""
    return {"OUT": out, "TOKENS": config.tokens, "SPAN": config.span}


def mla_decode_queries_supports(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    tokens, heads, width = q.shape
    _, nope, latent = w_uk.shape
    if q.dtype not in KINDS:
        return f"it takes bf16 and fp16, q is {str(q.dtype).removeprefix('torch.')}"
    if (nope, width - nope, latent) != (NOPE, ROPE, LATENT):
        return f"it takes {NOPE} columns without rope, {ROPE} with it, and latents of {LATENT}"
    if tokens == 0 or heads == 0:
        return "there are no queries"
    for name, x in (("q", q), ("w_uk", w_uk)):
        if x.data_ptr() % 16 or any(stride <= 0 or stride % 8 for stride in _strides(x)[:-1]):
            return f"the rows of {name} must be aligned to 16 bytes, its strides are {list(x.stride())}"
    return reason_against_cuda()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides as a tensor map requires them, multiples of 16 bytes; the stride of a dimension of size one is
    arbitrary."""
    odd = [x.shape[i] == 1 and (x.stride(i) <= 0 or x.stride(i) % 8 != 0) for i in range(x.dim() - 1)]
    return (*(8 if odd[i] else x.stride(i) for i in range(x.dim() - 1)), 1)
