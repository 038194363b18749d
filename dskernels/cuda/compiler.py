"""Compile a `.cu` file for the current GPU with NVRTC, through CuPy, which keeps the result on disk.

A kernel is compiled when one of its configurations is first needed. With NVRTC 13.0 on a core of an AMD EPYC, the 263
configurations that the tests compile take 0.04 to 3.0 s of CPU time each, half of them less than 0.2 s; those of the
e4m3 products in large tiles take 0.4 to 1.4 s, those of decode 2.2 to 3.0 s. From then on a kernel is loaded from
CuPy's cache (~/.cupy/kernel_cache or CUPY_CACHE_DIR), where it is found by a hash of the source, the options, and the
versions of CuPy and NVRTC. Several processes may start at the same time: each writes a temporary file in that folder
and renames it (`os.replace`), and a file whose SHA-1 is wrong is compiled again (CuPy 14.2,
cupy/cuda/_compiler_cache.py).

CuPy adds ``-ftz=true`` to every compilation: fp32 arithmetic flushes subnormals to zero, also in `__fdiv_rn`. Where
subnormals matter, write the operation in PTX (``div.rn.f32``), or compute with integers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HEADERS = Path(__file__).parent
FLAGS = ("-std=c++17", "-arch=sm_90a")


@functools.cache
def reason_against_cuda() -> str | None:
    """Why CUDA C++ cannot be compiled here, or None."""
    if importlib.util.find_spec("cupy") is None:
        return "CUDA C++ kernels are compiled by CuPy, which is not installed (pip install 'dskernels[cuda13]')"
    return None


def reason_against_compiling() -> str | None:
    """The same, but found out by really loading CuPy and NVRTC, which takes longer: for `dskernels doctor`."""
    if reason := reason_against_cuda():
        return reason
    try:
        with _using_nvrtc():
            _cupy().cuda.nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        return str(error)
    return None


def source_of(path: Path) -> str:
    """The file with our headers inserted at their first #include, so that a hash of this text alone can name a cached
    result."""
    return "\n".join(_lines(path, set()))


def _lines(path: Path, included: set[str]) -> list[str]:
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith('#include "'):
            lines += [] if line == "#pragma once" else [line]
        elif (name := line.split('"')[1]) not in included:
            included.add(name)
            lines += _lines(HEADERS / name, included)
    return lines


@contextlib.contextmanager
def _using_the_cache() -> Iterator[None]:
    """Turn an OSError (a read-only home, a full disk) into one that says how to move CuPy's cache."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"the cache of compiled kernels cannot be used ({error.strerror or error}): set CUPY_CACHE_DIR to a folder "
            "that can be written to; where that is full, CUPY_CACHE_IN_MEMORY=1",
            error.filename,
        ) from error


def _cupy() -> Any:
    try:
        with _using_the_cache():  # CuPy creates the folder when it is imported
            import cupy
    except ImportError as error:
        raise ImportError(
            f"CUDA C++ kernels are compiled by CuPy, which is installed and cannot be imported ({_first_line(error)}): "
            "it has to be the one for this CUDA (pip install 'dskernels[cuda12]' or 'dskernels[cuda13]')"
        ) from error
    return cupy


@contextlib.contextmanager
def _using_nvrtc() -> Iterator[None]:
    """Turn an error about a missing NVRTC into one that says how to install it."""
    try:
        yield
    except (ImportError, RuntimeError) as error:
        if "libnvrtc" not in str(error):
            raise
        raise RuntimeError(
            f"CUDA C++ kernels are compiled by NVRTC, which CuPy does not find ({_first_line(error)}): install the "
            "CUDA toolkit, or its parts by pip (cupy-cuda13x[ctk])"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip(" =")), type(error).__name__)


@functools.cache
def _module(path: Path, options: tuple[tuple[str, int], ...], device: int) -> Any:
    cupy = _cupy()
    flags = (*FLAGS, *(f"-D{name}={value}" for name, value in options))
    with cupy.cuda.Device(device), _using_the_cache(), _using_nvrtc():
        module = cupy.RawModule(code=source_of(path), options=flags, backend="nvrtc")
        module.compile()
    return module


def kernel(path: Path, name: str, options: Mapping[str, int], shared: int, device: int) -> int:
    """Handle (CUfunction) of kernel `name` of a `.cu` file.

    Args:
        path: the file.
        name: the kernel's name, ``extern "C"``.
        options: names and values of the -D options that specialise the file.
        shared: bytes of dynamic shared memory that a block may need.
        device: ordinal of the GPU.
    """
    cupy = _cupy()
    with cupy.cuda.Device(device):  # this also gives a new thread its CUDA context
        function = _module(path, tuple(sorted(options.items())), device).get_function(name)
        # The limit is never lowered, because kept launches of other shapes may need more.
        function.max_dynamic_shared_size_bytes = max(shared, function.max_dynamic_shared_size_bytes)
        return function.kernel.ptr
