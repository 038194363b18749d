"""The three driver calls that a launch needs, through ctypes: 5 us a launch, where CuPy's own takes 17 to 40."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_MAP_BYTES = 128
_ELEMENT = {torch.bfloat16: 9, torch.float16: 6, torch.float32: 7}
_UINT8 = 0
_NO_SWIZZLE, _SWIZZLE_128B = 0, 3
_PROMOTE_256B = 3


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def check(status: int, call: str) -> None:
    """Raise RuntimeError for a driver call that did not succeed."""
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{call}: {(text.value or b'unknown error').decode()} ({status})")


def tensor_map(x: Tensor, box: tuple[int, int], *, swizzle: bool) -> Any:
    """CUtensorMap of a matrix whose inner index is contiguous; `box` is what one copy takes, (outer, inner) elements.

    It depends on the address, the sizes and the strides alone, so it may be kept as long as these stay. Elements beyond
    the matrix are read as zero and not written.
    """
    outer, inner = x.shape
    storage = ctypes.create_string_buffer(_MAP_BYTES + 64)
    address = (ctypes.addressof(storage) + 63) // 64 * 64
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address),
        _ELEMENT.get(x.dtype, _UINT8),
        2,
        ctypes.c_void_p(x.data_ptr()),
        (ctypes.c_uint64 * 2)(inner, outer),
        (ctypes.c_uint64 * 1)(x.stride(0) * x.element_size()),
        (ctypes.c_uint32 * 2)(box[1], box[0]),
        (ctypes.c_uint32 * 2)(1, 1),
        0,
        _SWIZZLE_128B if swizzle else _NO_SWIZZLE,
        _PROMOTE_256B,
        0,
    )
    check(status, "cuTensorMapEncodeTiled")
    return (ctypes.c_char * _MAP_BYTES).from_address(address), storage


class Launch:
    """A kernel with its grid and arguments, packed once: calling it launches on torch's current stream."""

    def __init__(
        self, function: int, grid: int, threads: int, shared: int, arguments: Sequence[Any], device: torch.device
    ) -> None:
        """Pack `arguments`: ctypes values, or what `tensor_map` returns."""
        self._keep = arguments
        values = [a[0] if isinstance(a, tuple) else a for a in arguments]
        self._pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        self._device = device.index
        self._launch = functools.partial(
            _driver().cuLaunchKernel, ctypes.c_void_p(function), grid, 1, 1, threads, 1, 1, shared
        )

    def __call__(self) -> None:
        """Launch."""
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        status = self._launch(ctypes.c_void_p(stream), self._pointers, None)
        if status:
            check(status, "cuLaunchKernel")
