"""The values that operations take and return: plain named tuples, which `torch.compile` supports."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Block = tuple[int, int]


class Fp8Tensor(NamedTuple):
    """A matrix in e4m3 with one fp32 scale a tile: ``x[r, c] = data[r, c] * scale[r // block[0], c // block[1]]``.

    Attributes:
        data: float8_e4m3fn ``[rows, cols]`` (or ``[E, rows, cols]`` for a stack of expert weights), last dimension
            contiguous.
        scale: float32 ``[ceil(rows / block[0]), ceil(cols / block[1])]``, likewise stacked. Row-major, except that with
            ``block == (1, 128)`` the row index is contiguous and the column stride is the number of rows rounded up to
            4 (16 bytes), the layout that the tensor memory accelerator loads.
        block: the tile's (rows, columns): ``(1, 128)`` for activations, ``(128, 128)`` for weights, ``(128, 1)`` along
            tokens.
    """

    data: Tensor
    scale: Tensor
    block: Block = (1, 128)

    @classmethod
    def of(cls, data: Tensor, scale: Tensor, block: Block = (1, 128)) -> Fp8Tensor:
        """Wrap a matrix that something else quantised, with its scales in any layout.

        Args:
            data: float8_e4m3fn ``[..., rows, cols]``, last dimension contiguous.
            scale: float32 ``[..., ceil(rows / block[0]), ceil(cols / block[1])]``, any strides; copied only if they
                are not those that this class requires.
            block: the tile's (rows, columns).

        Nothing is checked here; the operations do that.
        """
        if block != (1, 128):
            return cls(data, scale.contiguous(), block)
        *stack, rows, cols = scale.shape
        if (rows > 1 and scale.stride(-2) != 1) or (cols > 1 and scale.stride(-1) % 4):
            by_column = scale.new_empty(*stack, cols, -(-rows // 4) * 4).mT[..., :rows, :]
            scale = by_column.copy_(scale)
        return cls(data, scale, block)

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix that this stands for."""
        return self.data.shape

    @property
    def device(self) -> torch.device:
        """Device of the data."""
        return self.data.device

    def to(self, device: torch.device | str) -> Fp8Tensor:
        """The same on another device, its scale in the same layout; `Tensor.to` closes the gaps between its columns."""
        scale = self.scale
        if device != scale.device:
            scale = scale.new_empty_strided(scale.shape, scale.stride(), device=device).copy_(scale)
        return Fp8Tensor(self.data.to(device), scale, self.block)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix in ``dtype``: every element times the scale of its tile, multiplied in fp32."""
        rows, cols = self.data.shape[-2:]
        scale = self.scale.repeat_interleave(self.block[0], -2)[..., :rows, :]
        scale = scale.repeat_interleave(self.block[1], -1)[..., :cols]
        return (self.data.float() * scale).to(dtype)


class Routing(NamedTuple):
    """Which experts each token goes to, and how much of each.

    Attributes:
        weights: float32 ``[T, k]``, what each chosen expert's output is multiplied by.
        experts: int32 ``[T, k]``, ids of the chosen experts, best first (of their places, where experts have copies).
        load: int32 ``[E]``, number of choices that fell on each expert.
        nonfinite: int32 ``[]``, number of tokens whose logits held a NaN or nothing finite (weights 0, not in
            ``load``).
    """

    weights: Tensor
    experts: Tensor
    load: Tensor
    nonfinite: Tensor


class LoadStatistics(NamedTuple):
    """How even the load of experts is. All are fp32; the leading dimensions are those of the load.

    Attributes:
        share: ``[..., E]``, each expert's load over the mean load: 1 where all is even.
        violation: ``[...]``, the largest share minus 1 ("MaxVio"): 0 where all is even, E - 1 where one takes all.
        deviation: ``[...]``, the standard deviation of the shares.
        idle: ``[...]``, the part of the experts that nobody chose.
    """

    share: Tensor
    violation: Tensor
    deviation: Tensor
    idle: Tensor


class Permuted(NamedTuple):
    """Token rows laid out expert by expert.

    Attributes:
        x: ``[T * k, hidden]``, the rows, in the dtype of the input; rows from ``offsets[E]`` on are zero.
        offsets: int32 ``[E + 1]``, the rows of expert ``e`` are ``offsets[e]`` to ``offsets[e + 1]``.
        index: int32 ``[T, k]``, the row of each choice, -1 where the choice was dropped.
    """

    x: Tensor
    offsets: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls on this
