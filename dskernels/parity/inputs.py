"""Random inputs for the parity cases, seeded, made on the CPU so that every device gets the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from dskernels.reference.fp8 import quantize
from dskernels.types import Block, Fp8Tensor


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normally distributed numbers times `scale`."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def spread(seed: int, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers whose magnitude changes every 128 columns, over four decades, so that a wrong scale is noticed."""
    generator = torch.Generator().manual_seed(seed)
    decades = torch.rand(-(-cols // 128), generator=generator) * 4 - 2
    return (torch.randn(rows, cols, generator=generator) * 10 ** decades.repeat_interleave(128)[:cols]).to(dtype)


def quantized(seed: int, rows: int, cols: int, block: Block, device: torch.device) -> Fp8Tensor:
    """A `spread` matrix, quantised by the reference."""
    return quantize(spread(seed, rows, cols), block).to(device)
