"""Compile a `.cu` file of the library on a machine without a GPU, with NVRTC, and read off what came of it."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import time
from pathlib import Path

from compiling import Report, run_tool
from dskernels.cuda.compiler import FLAGS, source_of


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
    library, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    flags = [flag.encode() for flag in (*FLAGS, "-ftz=true", *(f"-D{name}={value}" for name, value in options.items()))]
    text = source_of(path).encode()
    if library.nvrtcCreateProgram(ctypes.byref(program), text, path.name.encode(), 0, None, None):
        raise RuntimeError("nvrtcCreateProgram failed")
    failed = library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    if failed:
        raise RuntimeError(f"{path.name} {options}:\n{log.value.decode()}")
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, cubin)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    # A file may have several kernels: what the most demanding of them takes.
    usage: dict[str, int] = {}
    for name, value in re.findall(r"(\w+):(\d+)", run_tool(cubin.raw, "cuobjdump", "-res-usage")):
        usage[name] = max(usage.get(name, 0), int(value))
    return Report(
        source=f"{path.name} {options}",
        target="sm_90",
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        shared=shared + usage["SHARED"],
        tensor_memory=0,
        seconds=time.perf_counter() - began,
        cubin=cubin.raw,
    )
