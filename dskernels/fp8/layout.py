"""Empty tensors with the shapes and strides that quantising returns, for kernels and fake implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from dskernels.device import empty
from dskernels.types import Block
from dskernels.validate import ceil_div


def empty_quantized(x: Tensor, block: Block, transpose: bool = False) -> tuple[Tensor, Tensor]:
    """Data and scale for `x` [E?, rows, cols] in tiles of `block`, of x.T in transposed tiles if `transpose`."""
    *stack, rows, cols = x.shape
    if transpose:
        rows, cols, block = cols, rows, (block[1], block[0])
    data = empty(x, (*stack, rows, cols), torch.float8_e4m3fn)
    return data, empty_scale(x, (*stack, ceil_div(rows, block[0]), ceil_div(cols, block[1])), block)


def empty_scale(x: Tensor, shape: tuple[int, ...], block: Block) -> Tensor:
    """Scales in the layout of their block: row-major, except that for (1, 128) rows are contiguous and columns
    padded to 16 bytes."""
    if block != (1, 128) or len(shape) != 2:
        return empty(x, shape, torch.float32)
    padded = ceil_div(shape[0], 4) * 4
    return empty(x, shape, torch.float32, (1, padded))
