"""What enters the SwiGLU as the backward keeps it in fp8: rows of bytes, e4m3 values and then their scales.

Report section 3.3.3: inputs of the SwiGLU are cached in FP8, and its output is computed again. One tensor for both, so
that what an operation keeps is one result. With C columns a row has C bytes, filled up to a multiple of 16, and then a
float for each 128 of them, filled up likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dskernels.types import Fp8Tensor
from dskernels.validate import ceil_div

E4M3 = torch.float8_e4m3fn
# What an operation is told of what it keeps: whether it is kept, whether in e4m3 (which counts where it is computed
# again too), and whether a backward follows: then the output has the bits of one for which it is kept.
KEPT, PACKED, DIFFERENTIATED = 1, 2, 4


def is_packed(kept: Tensor) -> bool:
    """Whether what was kept, be it no rows, is packed."""
    return kept.dtype == torch.uint8


def scales_at(cols: int) -> int:
    """The byte of a row at which its scales begin."""
    return 16 * ceil_div(cols, 16)


def packed_width(cols: int) -> int:
    """Bytes of a row of `cols` values."""
    return scales_at(cols) + 16 * ceil_div(ceil_div(cols, 128), 4)


def empty_kept(x: Tensor, rows: int, cols: int, packed: bool) -> Tensor:
    """An empty tensor for `rows` rows of what enters a SwiGLU: packed, or in x's dtype."""
    return x.new_empty((rows, packed_width(cols)), dtype=torch.uint8) if packed else x.new_empty(rows, cols)


def pack(x: Fp8Tensor) -> Tensor:
    """uint8 ``[rows, packed_width]`` of a matrix in 1x128 tiles, as plain PyTorch."""
    rows, cols = x.shape
    packed = torch.zeros(rows, packed_width(cols), dtype=torch.uint8, device=x.device)
    packed[:, :cols] = x.data.view(torch.uint8)
    scales = torch.empty(x.scale.shape, device=x.device).copy_(x.scale).view(torch.uint8)
    packed[:, scales_at(cols) : scales_at(cols) + scales.shape[1]] = scales
    return packed


def parts_of(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The whole of it as e4m3, and as fp32: what kernels read by the two functions above."""
    return packed.view(E4M3), packed.view(torch.float32)
