"""Compile a `.cu` file of the library on a machine without a GPU, with NVRTC, and read off what came of it."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import re
import time
from collections.abc import Sequence
from pathlib import Path

from compiling import Report, run_tool
from dskernels.cuda.compiler import FLAGS, source_of
from keeping import kept


@functools.cache
def nvrtc() -> ctypes.CDLL:
    """NVIDIA's run-time compiler, from PyPI's nvidia-cuda-nvrtc."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for library in sorted(Path(folder).rglob("libnvrtc.so.*")):
            for builtins in library.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins))  # which it would look for by name alone
            return ctypes.CDLL(str(library))
    raise RuntimeError("NVRTC is not installed: pip install 'dskernels[test]'")


def compile_cuda(path: Path, options: dict[str, int], shared: int) -> Report:
    """Compile with the product's flags, and CuPy's, and these -D options for sm_90a; `shared` is what the launcher asks
    for."""
    began = time.perf_counter()
    flags = [*FLAGS, "-ftz=true", *(f"-D{name}={value}" for name, value in options.items())]
    text, version = source_of(path), importlib.metadata.version("nvidia-cuda-nvrtc")
    cubin = kept(lambda: _cubin(path.name, text, flags), text, *flags, version)
    # A file may have several kernels: what the most demanding of them takes.
    usage: dict[str, int] = {}
    for name, value in re.findall(r"(\w+):(\d+)", run_tool(cubin, "cuobjdump", "-res-usage")):
        usage[name] = max(usage.get(name, 0), int(value))
    return Report(
        source=f"{path.name} {options}",
        target="sm_90",
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        shared=shared + usage["SHARED"],
        tensor_memory=0,
        seconds=time.perf_counter() - began,
        cubin=cubin,
    )


def _cubin(name: str, text: str, flags: Sequence[str]) -> bytes:
    library, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    if library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None):
        raise RuntimeError("nvrtcCreateProgram failed")
    encoded = [flag.encode() for flag in flags]
    failed = library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*encoded))
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    if failed:
        raise RuntimeError(f"{name} {' '.join(flags)}:\n{log.value.decode()}")
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, cubin)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw
