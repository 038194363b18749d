"""The format in which the input of the SwiGLU (gate and up) is kept for the backward in fp8: rows of bytes.

As section 3.3.3 of the DeepSeek-V3 report has it, the inputs of the SwiGLU are cached in FP8, and its output is
computed again. Values and scales share one tensor, so that what an operation keeps is a single result. For C columns, a
row consists of C bytes of e4m3, padded to a multiple of 16 bytes, and then one fp32 scale for each 128 columns, padded
likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dskernels.types import Fp8Tensor
from dskernels.validate import ceil_div

E4M3 = torch.float8_e4m3fn
# Bits that tell an operation what to keep. KEPT: keep gate and up. PACKED: their format is e4m3, also if they are not
# kept but computed again, so that the values are the same. DIFFERENTIATED: a backward follows, even if nothing is kept:
# the output then has the same bits as if gate and up were kept.
KEPT, PACKED, DIFFERENTIATED = 1, 2, 4


def is_packed(kept: Tensor) -> bool:
    """Whether what was kept (even if it has no rows) is packed."""
    return kept.dtype == torch.uint8


def scales_at(cols: int) -> int:
    """The byte at which the scales of a row of `cols` values begin."""
    return 16 * ceil_div(cols, 16)


def packed_width(cols: int) -> int:
    """Number of bytes of a row of `cols` values with its scales."""
    return scales_at(cols) + 16 * ceil_div(ceil_div(cols, 128), 4)


def empty_kept(x: Tensor, rows: int, cols: int, packed: bool) -> Tensor:
    """An uninitialised tensor for `rows` rows of gate and up: packed, or in x's dtype."""
    return x.new_empty((rows, packed_width(cols)), dtype=torch.uint8) if packed else x.new_empty(rows, cols)


def pack(x: Fp8Tensor) -> Tensor:
    """Pack a matrix in 1x128 tiles into uint8 ``[rows, packed_width]``, in plain PyTorch."""
    rows, cols = x.shape
    packed = torch.zeros(rows, packed_width(cols), dtype=torch.uint8, device=x.device)
    packed[:, :cols] = x.data.view(torch.uint8)
    scales = torch.empty(x.scale.shape, device=x.device).copy_(x.scale).view(torch.uint8)
    packed[:, scales_at(cols) : scales_at(cols) + scales.shape[1]] = scales
    return packed


def parts_of(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The whole packed tensor viewed as e4m3, and as fp32, for kernels that find values and scales in it by
    `scales_at`."""
    return packed.view(E4M3), packed.view(torch.float32)
