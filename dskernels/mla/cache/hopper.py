"""Launcher of hopper.cu: the latent cache written on sm_90a, in CUDA C++.

It is CUDA C++ because all loads can be issued before the first use of any of them, squares be summed in fp64 at little
cost, which gives the reference's bytes, and two tokens share a warp. On an H200, with a cold L2: 65,536 tokens took
58.2 us in Triton and take 48.4, where a plain copy of as many bytes takes 46.8; e4m3 rows 54.8 and 41.6, a copy 39.3;
4,096 tokens 9.6 and 8.5, a copy 9.9, of which an empty kernel is 3.4 to 3.8. Slots in random order were 2% slower than
pages of consecutive tokens, e4m3 6%.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from dskernels.cuda.compiler import kernel, reason_against_cuda
from dskernels.cuda.driver import Plan, Planned, Pointer
from dskernels.mla.cache.config import WIDEST_LATENT, HopperConfig, choose_hopper
from dskernels.validate import ceil_div

SOURCE = Path(__file__).with_name("hopper.cu")


@Planned
def write_latent_cache(
    kv: Tensor,
    k_rope: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    eps: float,
) -> Plan:
    """Write the rows of `kv` [T, latent] and `k_rope` [T, rope] to their slots."""
    return plan(choose_hopper(cache.dtype == torch.uint8), kv, k_rope, norm_weight, cos, sin, cache, slots, eps)


def plan(
    config: HopperConfig,
    kv: Tensor,
    k_rope: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    eps: float,
) -> Plan:
    """The launch for a given config."""
    tokens, latent = kv.shape
    pages, page_size, _ = cache.shape
    options = options_of(config, cache.dtype == torch.uint8, latent, k_rope.shape[1])
    return Plan(
        kernel(SOURCE, "write_latent_cache", options, 0, kv.device.index),
        arguments=(
            *map(Pointer, ("kv", "k_rope", "norm_weight", "cos", "sin", "cache", "slots")),
            *(ctypes.c_uint(x.stride(0) * x.element_size()) for x in (kv, k_rope, cos, sin)),
            *(ctypes.c_uint(cache.stride(i) * cache.element_size()) for i in (0, 1)),
            *map(ctypes.c_int, (tokens, pages * page_size, page_size)),
            ctypes.c_float(eps),
        ),
        grid=ceil_div(tokens, 2 * config.warps),
        threads=32 * config.warps,
        shared=0,
        device=kv.device,
        programmatic=True,
    )


def options_of(config: HopperConfig, fp8: bool, latent: int, rope: int) -> dict[str, int]:
    """The options that hopper.cu is specialised by."""
    return {
        "FP8": int(fp8),
        "LATENT": latent,
        "ROPE": rope,
        "WARPS": config.warps,
        "BLOCKS": config.blocks,
        "UE8M0": 0,
    }


def write_latent_cache_supports(
    kv: Tensor,
    k_rope: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    eps: float,
) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    tokens, latent = kv.shape
    if tokens == 0 or cache.numel() == 0:
        return "there is nothing to write"
    for name, x in (("kv", kv), ("norm_weight", norm_weight), ("cache", cache)):
        if x.dtype != torch.bfloat16 and not (x is cache and x.dtype == torch.uint8):
            return f"it takes bf16, {name} is {str(x.dtype).removeprefix('torch.')}"
        if x.data_ptr() % 16 or any(stride * x.element_size() % 16 for stride in x.stride()[:-1]):
            return f"rows of {name} must be aligned to 16 bytes, its strides are {list(x.stride())}"
    if k_rope.data_ptr() % 4 or k_rope.stride(0) % 2:
        return f"pairs of k_rope must be aligned to 4 bytes, its strides are {list(k_rope.stride())}"
    if latent % 8 or latent > WIDEST_LATENT:
        return f"it takes latents of multiples of 8 columns up to {WIDEST_LATENT}, and there are {latent}"
    if cache.shape[0] * cache.shape[1] >= 2**31 or tokens >= 2**31:
        return "there are 2^31 slots or tokens, or more"
    for name, x in (("kv", kv), ("k_rope", k_rope), ("cos", cos), ("sin", sin), ("cache", cache)):
        if any(not 0 <= stride * x.element_size() < 2**32 for stride in x.stride()):
            return f"strides of {name} must be below 2^32 bytes, they are {list(x.stride())}"
    return reason_against_cuda()
