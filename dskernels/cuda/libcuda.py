"""The CUDA driver, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

INVALID_CONTEXT = 201


@functools.cache
def library(kind: type[ctypes.CDLL] = ctypes.CDLL) -> ctypes.CDLL:
    """The driver. As a CDLL it lets other Python threads run during a call, since a launch may wait for a full
    queue."""
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
    """Call a function of the driver in torch's context of a device.

    Arguments have to be ctypes values: the argument types of functions are not declared. Raises RuntimeError on
    failure.
    """
    function = getattr(library(), name)
    status = function(*arguments)
    if status == INVALID_CONTEXT:
        give_context(device)
        status = function(*arguments)
    check(status, name)


def capture_id(device: torch.device) -> int | None:
    """An id of the capture that the current stream is part of; None if there is none, or no driver to ask."""
    if not torch.cuda.is_current_stream_capturing() or torch.version.hip:
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    what = (stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    check(library().cuStreamGetCaptureInfo_v2(*what), "cuStreamGetCaptureInfo")
    return number.value


def give_context(device: int) -> None:
    """Give a thread that has not called CUDA yet the context in which torch works on this device."""
    check(library().cuCtxSetCurrent(_primary_context(device)), "cuCtxSetCurrent")


@functools.cache
def _primary_context(device: int) -> ctypes.c_void_p:
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    check(library().cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
    check(library().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain")
    return context
