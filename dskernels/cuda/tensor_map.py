"""Kernel arguments by which the tensor memory accelerator (TMA) copies tiles of tensors: tensor maps (CUtensorMap)."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dskernels.cuda import libcuda
from dskernels.validate import ceil_div

MAP_BYTES, MAP_ALIGNMENT = 128, 64
RAGGED_ROWS = 2**30  # the matrix of a `ragged_map` must have fewer rows

# Values of the driver's enumerations CUtensorMapDataType, CUtensorMapSwizzle and CUtensorMapL2promotion.
_ELEMENT = {torch.bfloat16: 9, torch.float16: 6, torch.float32: 7}
_UINT8 = 0
_SWIZZLE = {False: 0, 64: 2, True: 3}  # True stands for 128 bytes
_PROMOTE = {128: 2, 256: 3}


class TensorMap(NamedTuple):
    """A kernel argument that is a CUtensorMap: how TMA copies tiles of a matrix.

    Attributes:
        name: the parameter of the `Planned` function whose argument is the tensor that the map points to.
        x: the matrix ``[outer, inner]``, or a tensor of up to five dimensions, contiguous along the last; its sizes,
            strides and dtype are used. Elements outside of it are read as zero, and not written.
        box: what one copy takes: (outer, inner) elements, or one number for each dimension of `x`.
        swizzle: the swizzle in shared memory: True is 128 bytes, 64 is 64 bytes, False is none.
        sizes: sizes instead of those of `x`.
        strides: strides in elements instead of those of `x`.
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
    """Map of a matrix whose rows are divided into groups: a copy stops at the end of the group, even inside its box.

    Row r of a group that ends before row `end` has, from the innermost on, the coordinates (column, 2^30 + r - end,
    2^30, end), see `tma_load_ragged` in ptx.cuh. From row `end` on the second coordinate is out of bounds. Its 2^30
    adds nothing to the address: together with the third coordinate it is 2^30 steps of 2^34 bytes, which wrap around
    the 64 bits of an address. So the address is that of row `end` plus r - end rows. Triton's ragged descriptors do the
    same (triton/tools/ragged_tma.py). The matrix must have fewer than `RAGGED_ROWS` rows.
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
    """Map of the scales ``[rows, K / 128]`` of 1x128 tiles; a copy takes `rows` scales of one column.

    A tensor of a single column may have any column stride, since it is never used; the map then gets one that the
    driver accepts.
    """
    height, columns = scale.shape
    strides = (scale.stride(1) if columns > 1 else 4 * ceil_div(height, 4), 1)
    return TensorMap(name, scale.t(), (1, rows), swizzle=False, strides=strides)


def encode(description: TensorMap, memory: Any, i: int) -> Any:
    """Write the CUtensorMap into an array of 64-bit words, from word i on, which has to be aligned to 64 bytes.

    Returns the object through which another address can be set: ``returned[i] = address``. The driver's function for
    this takes 0.6 us through ctypes, an assignment to the array 0.1. Wherever this ran so far, the function only
    assigned the first word; but this is not documented, so it is tried here with an address in which all bits are
    flipped. If then the first word is that address and nothing else has changed, the array itself is returned.
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
    """A map whose address is set by the driver's function, whatever the index is."""

    def __init__(self, place: int) -> None:
        # PyDLL does not release the interpreter's lock, for which the call is too short.
        self.replace = functools.partial(libcuda.library(ctypes.PyDLL).cuTensorMapReplaceAddress, place)

    def __setitem__(self, i: int, address: int) -> None:
        libcuda.check(self.replace(address), "cuTensorMapReplaceAddress")
