"""Run a CUDA C++ kernel of warps on the CPU: compiled as C++, every thread a fiber, collectives as warp.h has them.

Between two collectives lanes run in a random order, so that a missing ``__syncwarp`` shows as a wrong result. Lanes
that meet in different collectives, a deadlock, and a misaligned or foreign address of shared memory are faults.
What hardware alone can say stays open: how PTX rounds, and how long it takes. Instructions that the source spells in
PTX are replaced, each by a pattern that must be found.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from keeping import kept

WARP = Path(__file__).with_name("warp.h")
FLAGS = ("-O1", "-std=c++17", "-fno-strict-aliasing", "-ffp-contract=off", "-w", "-shared", "-fPIC")


def has_compiler() -> bool:
    """Whether there is a C++ compiler."""
    return shutil.which("g++") is not None


@functools.cache
def _compiler() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


def compiled(text: str, *flags: str, includes: str = "") -> ctypes.CDLL:
    """The library that g++ makes of this text, in which `includes` says what it includes of ours."""

    def make() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "source.cpp"
            source.write_text(text)
            subprocess.run(["g++", *flags, "-o", source.with_suffix(".so"), source], check=True)
            return source.with_suffix(".so").read_bytes()

    # A file of its own for each: what they call may be static.
    path = Path(_folder().name) / f"{len(list(Path(_folder().name).iterdir()))}.so"
    path.write_bytes(kept(make, text, includes, *flags, _compiler()))
    return ctypes.CDLL(str(path))


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="emulated")


def build(
    source: Path, replacements: Mapping[str, str], options: Mapping[str, int], kernel: str, arguments: str
) -> ctypes.CDLL:
    """A library with ``launch(blocks, threads, seed, ...)``, which returns the number of faults.

    `replacements` maps regular expressions (in which a dot is any character) to C++; `arguments` are the kernel's
    parameters as C++ declares them.
    """
    text = source.read_text()
    for pattern, new in replacements.items():
        text, found = re.subn(pattern, lambda _, new=new: new, text, flags=re.DOTALL)
        if not found:
            raise RuntimeError(f"{source.name}: nothing is like {pattern!r}")
    names = ", ".join(re.split(r"[ *]+", argument.strip())[-1] for argument in arguments.split(","))
    text = f"""#include "{WARP}"
{text}
extern "C" int launch(int blocks, int threads, u32 seed, {arguments}) {{
    return emulate(blocks, threads, seed, [&] {{ {kernel}({names}); }});
}}
"""
    flags = [*FLAGS, *(f"-D{name}={value}" for name, value in options.items())]
    return compiled(text, *flags, includes=WARP.read_text())


def pointer(x: torch.Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor on the CPU, or null."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())
