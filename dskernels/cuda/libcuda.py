"""The CUDA driver, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

INVALID_CONTEXT = 201


@functools.cache
def library(kind: type[ctypes.CDLL] = ctypes.CDLL) -> ctypes.CDLL:
    """The driver's library. As a CDLL it lets other Python threads run during a call, because a launch may have to wait
    until the queue of launches has room."""
    functions = kind("libcuda.so.1")
    functions.cuTensorMapReplaceAddress.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    return functions


def check(status: int, call: str) -> None:
    """Raise RuntimeError for a driver call that did not succeed."""
    if status:
        text = ctypes.c_char_p()
        library().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{call}: {(text.value or b'unknown error').decode()} ({status})")


def call(name: str, device: int, *arguments: Any) -> None:
    """Call a function of the driver in the context that torch uses on a device.

    Arguments have to be ctypes values, because the functions' argument types are not declared. Raises RuntimeError if
    the call fails.
    """
    function = getattr(library(), name)
    status = function(*arguments)
    if status == INVALID_CONTEXT:
        give_context(device)
        status = function(*arguments)
    check(status, name)


def capture_id(device: torch.device) -> int | None:
    """The id of the CUDA graph capture that the current stream is in; None if there is none, or on an AMD GPU."""
    if not torch.cuda.is_current_stream_capturing() or torch.version.hip:
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    what = (stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    check(library().cuStreamGetCaptureInfo_v2(*what), "cuStreamGetCaptureInfo")
    return number.value


def give_context(device: int) -> None:
    """Make the context that torch uses on this device current, in a thread that has not called CUDA yet."""
    check(library().cuCtxSetCurrent(_primary_context(device)), "cuCtxSetCurrent")


@functools.cache
def _primary_context(device: int) -> ctypes.c_void_p:
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    check(library().cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
    check(library().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain")
    return context
