"""Random inputs, made on the device, with no more memory at once than one expert's weight in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import dskernels as ds
from dskernels import Fp8Tensor


def bf16(*shape: int, device: torch.device, scale: float = 1.0) -> Tensor:
    """Normal numbers in bf16."""
    return torch.randn(*shape, device=device, dtype=torch.bfloat16).mul_(scale)


def activation(m: int, k: int, device: torch.device) -> Fp8Tensor:
    """`m` tokens in 1x128 tiles, by the reference, so that a GEMM's case stands on nothing but the GEMM."""
    return ds.quantize(bf16(m, k, device=device), impl="reference")


def weight(n: int, k: int, device: torch.device) -> Fp8Tensor:
    """A weight in 128x128 blocks; its products with normal numbers are normal."""
    return ds.quantize(bf16(n, k, device=device, scale=k**-0.5), (128, 128), impl="reference")


def expert_weights(e: int, n: int, k: int, device: torch.device) -> Fp8Tensor:
    """A stack of weights, quantised one by one."""
    data = torch.empty(e, n, k, device=device, dtype=torch.float8_e4m3fn)
    scale = torch.empty(e, -(-n // 128), -(-k // 128), device=device)
    for i in range(e):
        one = weight(n, k, device)
        data[i].copy_(one.data)
        scale[i].copy_(one.scale)
    return Fp8Tensor(data, scale, (128, 128))


def offsets(rows: Sequence[int], device: torch.device) -> Tensor:
    """Where each group of rows starts, and the end: int32 ``[len(rows) + 1]``."""
    ends = torch.tensor([0, *rows]).cumsum(0)
    return ends.to(device=device, dtype=torch.int32)


def block_table(requests: int, pages: int, device: torch.device) -> Tensor:
    """A row of page ids for each request, in random order, as a cache that has been in use for a while has them."""
    return torch.randperm(requests * pages, device=device).int().view(requests, pages)


def slots(tokens: int, device: torch.device) -> Tensor:
    """A slot for each token, in random order: int64."""
    return torch.randperm(tokens, device=device)
