"""Maps by which the tensor memory accelerator copies tiles of tensors (CUtensorMap), as arguments of a kernel."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dskernels.cuda import libcuda
from dskernels.validate import ceil_div

MAP_BYTES, MAP_ALIGNMENT = 128, 64
RAGGED_ROWS = 2**30  # a `ragged_map` is of fewer rows

_ELEMENT = {torch.bfloat16: 9, torch.float16: 6, torch.float32: 7}
_UINT8 = 0
_SWIZZLE = {False: 0, 64: 2, True: 3}  # True is 1, and stands for 128
_PROMOTE = {128: 2, 256: 3}


class TensorMap(NamedTuple):
    """A kernel argument that is a CUtensorMap: how the tensor memory accelerator copies tiles of a matrix.

    Attributes:
        name: parameter of the `Planned` function that holds the tensor whose address it gets.
        x: the matrix ``[outer, inner]`` there, or a tensor of up to five dimensions, its inner index contiguous: sizes,
            strides and dtype count. Elements beyond them are read as zero and not written.
        box: what one copy takes, (outer, inner) elements, or of so many dimensions as `x` has.
        swizzle: whether shared memory is swizzled, by 128 bytes, else not at all; 64 if by so many.
        sizes: in place of those of `x`.
        strides: in elements, in place of those of `x`.
        fetch: bytes that the L2 fetches at a time, 128 or 256.
    """

    name: str
    x: Tensor
    box: tuple[int, ...]
    swizzle: bool | int
    sizes: tuple[int, ...] | None = None
    strides: tuple[int, ...] | None = None
    fetch: int = 256


def ragged_map(name: str, x: Tensor, box: tuple[int, int]) -> TensorMap:
    """Map of a matrix whose rows stand in groups: a copy ends where the group does, wherever its box does.

    Row r of a group that ends before row `end` is, from the innermost coordinate on, (column, 2^30 + r - end, 2^30,
    end), see `tma_load_ragged` in ptx.cuh: the second and the third add up to the distance from the group's end, as
    2^30 steps of 2^34 bytes wrap around the 64 bits of an address, and the second is out of bounds from the end on.
    Triton's ragged descriptors do the same (triton/tools/ragged_tma.py). Rows must be fewer than `RAGGED_ROWS`.
    """
    stride = x.stride(0)
    around = 2**34 // x.element_size() - stride
    return TensorMap(
        name,
        x,
        (1, 1, *box),
        swizzle=True,
        sizes=(x.shape[0] + 1, RAGGED_ROWS + 1, RAGGED_ROWS, x.shape[1]),
        strides=(stride, around, stride, 1),
    )


def scale_map(name: str, scale: Tensor, rows: int) -> TensorMap:
    """Map of the scales ``[rows, K / 128]`` of 1x128 tiles, `rows` of one column in a copy.

    The stride of a single column may be anything, as nothing is read by it; the map gets one that the driver takes.
    """
    height, columns = scale.shape
    strides = (scale.stride(1) if columns > 1 else 4 * ceil_div(height, 4), 1)
    return TensorMap(name, scale.t(), (1, rows), swizzle=False, strides=strides)


def encode(description: TensorMap, memory: Any, i: int) -> Any:
    """Write the CUtensorMap into an array of 64-bit words, from word i on, at an address divisible by 64.

    Returns what another address is assigned to, ``returned[i] = address``: the array itself where the driver's function
    for that does but assign the first word, as it did wherever this ran. It takes 0.6 us through ctypes, an assignment
    0.1. What it does is not documented, so this tries it on an address with all other bits: if that comes out as the
    first word and nothing else changes, that is all of it.
    """
    x, box = description.x, description.box
    sizes, strides = description.sizes or x.shape, description.strides or x.stride()
    rank, place = len(sizes), ctypes.addressof(memory) + 8 * i
    status = libcuda.library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(place),
        _ELEMENT.get(x.dtype, _UINT8),
        rank,
        ctypes.c_void_p(x.data_ptr()),
        (ctypes.c_uint64 * rank)(*sizes[::-1]),
        (ctypes.c_uint64 * (rank - 1))(*(stride * x.element_size() for stride in strides[-2::-1])),
        (ctypes.c_uint32 * rank)(*box[::-1]),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,
        _SWIZZLE[description.swizzle],
        _PROMOTE[description.fetch],
        0,
    )
    libcuda.check(status, "cuTensorMapEncodeTiled")
    by_driver, end = _ByDriver(place), i + MAP_BYTES // 8
    before, other = memory[i:end], x.data_ptr() ^ 0x7FFF_FFFF_FFF0
    plain = before[0] == x.data_ptr() and by_driver.replace(other) == 0 and memory[i:end] == [other, *before[1:]]
    by_driver[i] = x.data_ptr()
    return memory if plain else by_driver


class _ByDriver:
    """A map whose address the driver's function writes, at whatever index."""

    def __init__(self, place: int) -> None:
        # PyDLL keeps the interpreter's lock: the call is too short to let another thread in.
        self.replace = functools.partial(libcuda.library(ctypes.PyDLL).cuTensorMapReplaceAddress, place)

    def __setitem__(self, i: int, address: int) -> None:
        libcuda.check(self.replace(address), "cuTensorMapReplaceAddress")
